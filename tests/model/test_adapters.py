"""Every LoRA format against a reference: the weights with ΔW added in float32."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from klein.core import GenerationResult, Job
from klein.errors import LoraError, LoraUnavailable
from klein.inference.adapters import factors
from klein.inference.adapters.merge import AdapterRequest, LoraMerger
from klein.inference.pipeline import KleinPipeline
from klein.lora.file import LoraFile, inspect
from klein.lora.library import LoraLibrary
from klein.lora.spec import LoraSpec
from tests.model.conftest import Draw, make_job
from tests.model.stock import stock
from tests.support import loras, tiny
from tests.support.loras import Array

SHAPES = loras.layers(tiny.HIDDEN)
RANK = 4
Made = tuple[dict[str, Array], dict[str, Array], dict[str, str]]
"""Tensors of the file, ΔW by BFL layer, metadata."""


def _low_rank(name: Callable[[str], str], down: str, up: str, alpha: float | None) -> Made:
    tensors, deltas = {}, {}
    for number, (layer, (rows, columns)) in enumerate(SHAPES.items()):
        a, b = loras.random((RANK, columns), number), loras.random((rows, RANK), 1000 + number)
        tensors[f"{name(layer)}.{down}"], tensors[f"{name(layer)}.{up}"] = a, b
        deltas[layer] = b @ a * (1.0 if alpha is None else alpha / RANK)
        if alpha is not None:
            tensors[f"{name(layer)}.alpha"] = np.array(alpha, dtype=np.float32)
    return tensors, deltas, {}


def _split_qkv(prefix: str, down: str, up: str) -> Made:
    """diffusers' names, where q, k and v are three layers."""
    tensors, deltas = {}, {}
    for number, layer in enumerate(SHAPES):
        modules = _modules(layer)
        rows, columns = SHAPES[layer]
        stacked = []
        for part, module in enumerate(modules):
            a = loras.random((RANK, columns), 10 * number + part)
            b = loras.random((rows // len(modules), RANK), 5000 + 10 * number + part)
            tensors[f"{prefix}{module}.{down}"], tensors[f"{prefix}{module}.{up}"] = a, b
            stacked.append(b @ a)
        deltas[layer] = np.concatenate(stacked)
    return tensors, deltas, {}


def _lokr(full: bool) -> Made:
    tensors, deltas = {}, {}
    for number, (layer, (rows, columns)) in enumerate(SHAPES.items()):
        name = f"diffusion_model.{layer}"
        w1 = loras.random((4, 4), number)
        if full:
            w2 = loras.random((rows // 4, columns // 4), 100 + number)
            tensors[f"{name}.lokr_w2"], scale = w2, 1.0
        else:
            a = loras.random((rows // 4, RANK), 200 + number)
            b = loras.random((RANK, columns // 4), 300 + number)
            tensors[f"{name}.lokr_w2_a"], tensors[f"{name}.lokr_w2_b"] = a, b
            w2, scale = a @ b, 2.0 / RANK
        tensors[f"{name}.lokr_w1"] = w1
        tensors[f"{name}.alpha"] = np.array(2.0, dtype=np.float32)
        deltas[layer] = (np.kron(w1, w2) * scale).astype(np.float32)
    return tensors, deltas, {}


def _loha() -> Made:
    tensors, deltas = {}, {}
    for number, (layer, (rows, columns)) in enumerate(SHAPES.items()):
        name, parts = f"lora_unet_{layer.replace('.', '_')}", []
        for part, shape in enumerate([(rows, RANK), (RANK, columns)] * 2):
            made = loras.random(shape, 10 * number + part, 0.5)
            tensors[f"{name}.hada_w{part // 2 + 1}_{'ab'[part % 2]}"] = made
            parts.append(made)
        tensors[f"{name}.alpha"] = np.array(1.0, dtype=np.float32)
        change = (parts[0] @ parts[1]) * (parts[2] @ parts[3]) / RANK
        deltas[layer] = change.astype(np.float32)
    return tensors, deltas, {}


def _diff() -> Made:
    numbered = enumerate(SHAPES.items())
    deltas = {layer: loras.random(shape, number, 0.05) for number, (layer, shape) in numbered}
    return {f"diffusion_model.{layer}.diff": d for layer, d in deltas.items()}, deltas, {}


def _lokr_by_module() -> Made:
    """SimpleTuner's: LyCORIS around diffusers' model, module paths with underscores."""
    tensors, deltas = {}, {}
    for number, (layer, (rows, columns)) in enumerate(SHAPES.items()):
        modules, stacked = _modules(layer), []
        for part, module in enumerate(modules):
            w1 = loras.random((2, 4), 10 * number + part)
            w2 = loras.random((rows // len(modules) // 2, columns // 4), 700 + 10 * number + part)
            name = f"lycoris_{module.replace('.', '_')}"
            tensors[f"{name}.lokr_w1"], tensors[f"{name}.lokr_w2"] = w1, w2
            tensors[f"{name}.alpha"] = np.array(8.0, dtype=np.float32)
            stacked.append(np.kron(w1, w2))
        deltas[layer] = np.concatenate(stacked).astype(np.float32)
    return tensors, deltas, {}


def _split_under_bfl() -> Made:
    """Black Forest Labs' paths with q, k and v apart."""
    tensors, deltas = {}, {}
    for number, (layer, (rows, columns)) in enumerate(SHAPES.items()):
        parts = [f"to_{part}" for part in "qkv"] if layer.endswith("qkv") else [""]
        stacked = []
        for part, suffix in enumerate(parts):
            name = f"diffusion_model.{layer.removesuffix('qkv')}{suffix}"
            a = loras.random((RANK, columns), 10 * number + part)
            b = loras.random((rows // len(parts), RANK), 900 + 10 * number + part)
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, b
            stacked.append(b @ a)
        deltas[layer] = np.concatenate(stacked)
    return tensors, deltas, {}


def _leading_rows() -> Made:
    """`linear1_qkv`: of the rows of linear1 only q, k and v, as LoRA, LoKr and whole."""
    tensors, deltas, h = {}, {}, tiny.HIDDEN
    a, b = loras.random((RANK, h), 1), loras.random((3 * h, RANK), 2, 1.0)
    w1, w2 = loras.random((3, 1), 3), loras.random((h, h), 4)
    name = "diffusion_model.single_blocks.{}.linear1_qkv"
    tensors[f"{name.format(0)}.lora_down.weight"] = a
    tensors[f"{name.format(0)}.lora_up.weight"] = b
    tensors[f"{name.format(0)}.alpha"] = np.array(1.0, dtype=np.float32)
    tensors[f"{name.format(1)}.lokr_w1"], tensors[f"{name.format(1)}.lokr_w2"] = w1, w2
    for block, change in enumerate((b @ a / RANK, np.kron(w1, w2))):
        whole = np.zeros((9 * h, h), dtype=np.float32)
        whole[: 3 * h] = change
        deltas[f"single_blocks.{block}.linear1"] = whole
    return tensors, deltas, {}


def _renamed(made: Made, old: str, new: str) -> Made:
    tensors, deltas, metadata = made
    return {name.replace(old, new): array for name, array in tensors.items()}, deltas, metadata


def _with_text_encoder() -> Made:
    """As ComfyUI's merges are saved: with changes of a text encoder, which are left out."""
    tensors, deltas, metadata = FORMATS["kohya"]()
    for name in ("lora_te_layers_0_q_proj", "text_encoders.qwen3_8b.model.layers.0.q_proj"):
        tensors[f"{name}.lora_down.weight"] = loras.random((4, 16), 1)
        tensors[f"{name}.lora_up.weight"] = loras.random((16, 4), 2)
    return tensors, deltas, metadata


def _dotted(prefix: str) -> Callable[[str], str]:
    return lambda layer: f"{prefix}{layer}"


AB = ("lora_A.weight", "lora_B.weight")
FORMATS: dict[str, Callable[[], Made]] = {
    "ai-toolkit": lambda: _low_rank(_dotted("diffusion_model."), *AB, None),
    "ai-toolkit with alpha": lambda: _low_rank(_dotted("diffusion_model."), *AB, 2.0),
    "kohya": lambda: _low_rank(
        lambda x: "lora_unet_" + x.replace(".", "_"), "lora_down.weight", "lora_up.weight", 2.0
    ),
    "down/up under diffusion_model": lambda: _low_rank(
        _dotted("diffusion_model."), "lora_down.weight", "lora_up.weight", 3.0
    ),
    "diffusers": lambda: _split_qkv("transformer.", *AB),
    "OneTrainer": lambda: _split_qkv("transformer.", "lora_down.weight", "lora_up.weight"),
    "PEFT": lambda: _low_rank(_dotted("base_model.model."), *AB, None),
    "PEFT with diffusers names": lambda: _split_qkv("base_model.model.", *AB),
    "bare diffusers": lambda: _split_qkv("", "lora_A.default.weight", "lora_B.default.weight"),
    "bare BFL": lambda: _low_rank(_dotted(""), *AB, None),
    "model.diffusion_model": lambda: _low_rank(_dotted("model.diffusion_model."), *AB, None),
    "LoKr": lambda: _lokr(full=True),
    "LoKr decomposed": lambda: _lokr(full=False),
    "LoHa": _loha,
    "diff": _diff,
    "SimpleTuner": _lokr_by_module,
    "adapters by name": lambda: _split_qkv(
        "base_model.model.", "lora_A.zib_0.weight", "lora_B.zib_0.weight"
    ),
    "old diffusers": lambda: _split_qkv(
        "unet.", "lora_linear_layer.down.weight", "lora_linear_layer.up.weight"
    ),
    "BFL with q, k, v apart": _split_under_bfl,
    "linear1_qkv": _leading_rows,
    "sformer_blocks": lambda: _renamed(
        _split_qkv("diffusion_model.", *AB), "model.transformer_blocks", "model.sformer_blocks"
    ),
    "with a text encoder": _with_text_encoder,
}


def _modules(layer: str) -> tuple[str, ...]:
    """BFL layer → diffusers modules, written down apart from klein's own table."""
    kind, block, rest = layer.split(".", 2)
    if kind == "single_blocks":
        inner = {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"}[rest]
        return (f"single_transformer_blocks.{block}.{inner}",)
    parts = {
        "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "img_attn.proj": ("attn.to_out.0",),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "txt_attn.proj": ("attn.to_add_out",),
        "img_mlp.0": ("ff.linear_in",),
        "img_mlp.2": ("ff.linear_out",),
        "txt_mlp.0": ("ff_context.linear_in",),
        "txt_mlp.2": ("ff_context.linear_out",),
    }[rest]
    return tuple(f"transformer_blocks.{block}.{part}" for part in parts)


def _reference(folder: Path, deltas: dict[str, Array], scale: float) -> Any:
    """The stock pipeline with scale · ΔW added to its weights."""
    pipe = stock(folder)
    modules = dict(pipe.transformer.named_modules())
    for layer, delta in deltas.items():
        names = _modules(layer)
        for name, piece in zip(names, np.split(delta, len(names)), strict=True):
            modules[name].weight.data += scale * torch.from_numpy(piece)
    return pipe


@pytest.fixture(scope="module")
def over_klein(tiny_pipe: KleinPipeline, tiny_folder: Path) -> Any:
    """diffusers' pipeline over the transformer that klein merges LoRAs into."""
    return stock(tiny_folder, transformer=tiny_pipe.parts.transformer)


def _latents(pipe: Any) -> torch.Tensor:
    made = pipe(
        prompt="a portrait",
        width=64,
        height=64,
        num_inference_steps=2,
        guidance_scale=2.5,
        max_sequence_length=64,
        generator=torch.Generator("cpu").manual_seed(1),
        output_type="latent",
    )
    return torch.as_tensor(made.images)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_its_delta(
    name: str, over_klein: Any, tiny_folder: Path, lora_folder: Path, draw: Draw
) -> None:
    """Loaded through klein, the output is that of the weights with ΔW added, within 1e-4."""
    tensors, deltas, metadata = FORMATS[name]()
    loras.write(lora_folder / f"{name.replace('/', '-')}.safetensors", tensors, metadata)
    lora = {"path": f"{name.replace('/', '-')}.safetensors", "scale": 0.7}
    (report,) = draw(loras=[lora], lora_error="fail").loras
    assert report.applied
    assert report.layers_matched == report.layers_in_file > 0
    assert report.relative_change is not None
    assert report.relative_change > 0.001
    expected = _latents(_reference(tiny_folder, deltas, 0.7))
    got = _latents(over_klein)
    assert torch.allclose(got, expected, atol=1e-4)
    draw()
    assert (_latents(over_klein) - expected).abs().max() > 1e-2


def test_dora_is_applied_truly(
    over_klein: Any, tiny_folder: Path, lora_folder: Path, draw: Draw
) -> None:
    """W' = m · (W + ΔW) / |W + ΔW| by rows; diffusers would drop m with a warning."""
    tensors, deltas, _ = FORMATS["ai-toolkit"]()
    reference = _reference(tiny_folder, {}, 0)
    modules = dict(reference.transformer.named_modules())
    for layer, delta in deltas.items():
        names = _modules(layer)
        weight = np.concatenate([modules[name].weight.detach().numpy() for name in names])
        magnitude = np.abs(loras.random((len(weight),), 77)) + np.float32(0.5)
        tensors[f"diffusion_model.{layer}.magnitude"] = magnitude
        merged = weight + delta
        merged = magnitude[:, None] * merged / np.linalg.norm(merged, axis=1, keepdims=True)
        for name, piece in zip(names, np.split(merged, len(names)), strict=True):
            modules[name].weight.data = torch.from_numpy(piece)
    loras.write(lora_folder / "dora.safetensors", tensors)
    draw(loras=[{"path": "dora.safetensors"}], lora_error="fail")
    assert torch.allclose(_latents(over_klein), _latents(reference), atol=1e-4)


def test_merging_is_what_peft_does(
    over_klein: Any, tiny_folder: Path, lora_folder: Path, draw: Draw
) -> None:
    """diffusers' own loader, with PEFT's adapter layers, draws the same latents."""
    tensors, _, _ = FORMATS["ai-toolkit"]()
    path = loras.write(lora_folder / "peft.safetensors", tensors)
    peft = _reference(tiny_folder, {}, 0)
    peft.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="a")
    peft.set_adapters(["a"], [0.6])
    draw(loras=[{"path": path.name, "scale": 0.6}], lora_error="fail")
    assert torch.allclose(_latents(over_klein), _latents(peft), atol=1e-4)


def _final(name: str, form: str) -> tuple[dict[str, Array], Array]:
    h = tiny.HIDDEN
    if form == "diff":
        delta = loras.random((2 * h, h), 1, 0.2)
        return {f"{name}.diff": delta}, delta
    a, b = loras.random((4, h), 1), loras.random((2 * h, 4), 2)
    alpha = np.array(2.0, dtype=np.float32)
    tensors = {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": alpha}
    return tensors, (b @ a / 2).astype(np.float32)


@pytest.mark.parametrize("form", ["diff", "lora"])
@pytest.mark.parametrize(
    ("name", "swapped"),
    [
        ("diffusion_model.final_layer.adaLN_modulation.1", True),
        ("lora_unet_final_layer_adaLN_modulation_1", True),
        ("transformer.norm_out.linear", False),
    ],
)
def test_the_final_modulation_of_bfl_is_swapped(
    name: str,
    swapped: bool,
    form: str,
    over_klein: Any,
    tiny_folder: Path,
    lora_folder: Path,
    draw: Draw,
) -> None:
    """BFL keeps shift before scale, diffusers scale before shift: rows change places."""
    h = tiny.HIDDEN
    tensors, delta = _final(name, form)
    path = loras.write(lora_folder / "final.safetensors", tensors)
    reference = _reference(tiny_folder, {}, 0)
    if swapped:
        delta = np.concatenate([delta[h:], delta[:h]])
    reference.transformer.norm_out.linear.weight.data += torch.from_numpy(delta)
    draw(loras=[{"path": path.name}], lora_error="fail")
    assert torch.allclose(_latents(over_klein), _latents(reference), atol=1e-4)


def _cayley(upper: Array, side: int) -> Array:
    """(I + Q)(I - Q)⁻¹ of the skew matrix with this upper triangle, row by row."""
    skew = np.zeros((side, side))
    skew[np.triu_indices(side, 1)] = upper
    skew -= skew.T
    return (np.eye(side) + skew) @ np.linalg.inv(np.eye(side) - skew)


@pytest.mark.parametrize("form", ["a block for each", "one for all", "scaled"])
def test_an_oft_turns_its_inputs(
    form: str, over_klein: Any, tiny_folder: Path, lora_folder: Path, draw: Draw
) -> None:
    """OneTrainer's: W' = W Rᵀ block by block, R by Cayley's transform; at a scale in between."""
    side, elements = 8, 28
    reference = _reference(tiny_folder, {}, 0)
    modules, tensors = dict(reference.transformer.named_modules()), {}
    for number, (layer, (_, columns)) in enumerate(SHAPES.items()):
        blocks = 1 if form == "one for all" else columns // side
        scaled = form == "scaled"
        stored = loras.random((blocks, elements), number, 0.1 if scaled else 0.02)
        name = f"transformer.{layer}" if number % 2 else f"lora_unet_{layer.replace('.', '_')}"
        tensors[f"{name}.oft_R.weight"], upper = stored, stored.astype(np.float64)
        if scaled:
            tensors[f"{name}.oft_R.scaled_oft"] = np.array(1.0, dtype=np.float32)
            upper = upper / elements**0.5
        turns = [_cayley(upper[block % blocks], side) for block in range(columns // side)]
        for module in _modules(layer):
            weight = modules[module].weight
            whole = weight.detach().numpy().astype(np.float64)
            pieces = np.split(whole, columns // side, axis=1)
            turned = np.concatenate(
                [piece @ turn.T for piece, turn in zip(pieces, turns, strict=True)], axis=1
            )
            weight.data = torch.from_numpy((whole + 0.6 * (turned - whole)).astype(np.float32))
    loras.write(lora_folder / "oft.safetensors", tensors)
    base = _latents(over_klein)
    lora = {"path": "oft.safetensors", "scale": 0.6}
    (report,) = draw(loras=[lora], lora_error="fail").loras
    assert (report.format, report.rank, report.effective_scale) == ("kohya oft", side, 0.6)
    assert torch.allclose(_latents(over_klein), _latents(reference), atol=1e-4)
    assert (base - _latents(over_klein)).abs().max() > 1e-3
    draw()


DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"
NORMS = {
    "model.diffusion_model.double_blocks.0.img_attn.norm.query_norm.scale.diff": (
        f"{DOUBLE}.0.attn.norm_q"
    ),
    "diffusion_model.double_blocks.1.txt_attn.norm.key_norm.diff": f"{DOUBLE}.1.attn.norm_added_k",
    "lora_unet_single_blocks_1_norm_key_norm.w_norm": f"{SINGLE}.1.attn.norm_k",
    f"transformer.{SINGLE}.0.attn.norm_q.diff": f"{SINGLE}.0.attn.norm_q",
}


def test_norms_are_changed(
    over_klein: Any, tiny_folder: Path, lora_folder: Path, draw: Draw
) -> None:
    """In every spelling; zeros for biases, which no layer has, are no reason to refuse them."""
    tensors, reference = {}, _reference(tiny_folder, {}, 0)
    modules = dict(reference.transformer.named_modules())
    for number, (name, module) in enumerate(NORMS.items()):
        change = loras.random((16,), number)
        tensors[name] = change
        modules[module].weight.data += torch.from_numpy(change)
    tensors["diffusion_model.double_blocks.0.img_mlp.0.diff_b"] = np.zeros(6, dtype=np.float32)
    tensors["lora_unet_single_blocks_1_norm_key_norm.b_norm"] = np.zeros(16, dtype=np.float32)
    loras.write(lora_folder / "norms.safetensors", tensors)
    draw()
    weights = {k: v.clone() for k, v in over_klein.transformer.state_dict().items()}
    (report,) = draw(loras=[{"path": "norms.safetensors"}], lora_error="fail").loras
    assert report.layers_matched == 4
    assert torch.allclose(_latents(over_klein), _latents(reference), atol=1e-4)
    draw()
    after = over_klein.transformer.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in weights.items())
    tensors["diffusion_model.double_blocks.0.img_mlp.0.diff_b"][3] = 0.1
    loras.write(lora_folder / "norms.safetensors", tensors)
    with pytest.raises(LoraError, match=r"'norms\.safetensors' changes biases"):
        draw(loras=[{"path": "norms.safetensors"}], lora_error="fail")


@pytest.fixture(scope="module")
def two(lora_folder: Path) -> tuple[str, str]:
    """Two different LoRAs, the second of another rank and on fewer layers."""
    tensors, metadata = loras.ai_toolkit(SHAPES, rank=4, seed=1, trigger="zibbo")
    loras.write(lora_folder / "a.safetensors", tensors, metadata)
    few = dict(list(SHAPES.items())[:5])
    tensors, metadata = loras.ai_toolkit(few, rank=8, seed=500)
    loras.write(lora_folder / "b.safetensors", tensors, metadata)
    return "a.safetensors", "b.safetensors"


def _bytes(result: GenerationResult) -> bytes:
    return result.images[0].image.tobytes()


def test_nothing_ever_leaks(draw: Draw, two: tuple[str, str], tiny_pipe: KleinPipeline) -> None:
    """base → A → B → A+B → A → base: the same pictures and bit-identical weights each time."""
    draw()
    weights = {k: v.clone() for k, v in tiny_pipe.parts.transformer.state_dict().items()}
    a, b = ([{"path": path, "scale": 0.8}] for path in two)
    base, with_a, with_b, both = (_bytes(draw(loras=x)) for x in ([], a, b, a + b))
    assert len({base, with_a, with_b, both}) == 4
    assert _bytes(draw(loras=a)) == with_a
    assert _bytes(draw(loras=b + a)) != with_a
    assert _bytes(draw(loras=a)) == with_a
    assert _bytes(draw()) == base
    after = tiny_pipe.parts.transformer.state_dict()
    assert all(torch.equal(after[k], v) for k, v in weights.items())


def test_scales(draw: Draw, two: tuple[str, str]) -> None:
    """0 is bit-identical to none, other scales differ, negative ones too; the report says so."""
    pictures = {}
    for scale in (0.0, 0.5, 1.0, -1.0):
        result = draw(loras=[{"path": two[0], "scale": scale}])
        pictures[scale] = _bytes(result)
        assert result.loras[0].scale == scale
    assert pictures[0.0] == _bytes(draw())
    assert len(set(pictures.values())) == 4


def test_the_same_lora_twice_adds_up(draw: Draw, two: tuple[str, str]) -> None:
    """0.3 and 0.5 of one LoRA are 0.8 of it, to rounding."""
    twice = draw(loras=[{"path": two[0], "scale": 0.3}, {"path": two[0], "scale": 0.5}])
    once = draw(loras=[{"path": two[0], "scale": 0.8}])
    difference = np.abs(
        np.asarray(twice.images[0].image, int) - np.asarray(once.images[0].image, int)
    )
    assert difference.max() <= 2
    assert [report.scale for report in twice.loras] == [0.3, 0.5]


def test_the_report_proves_it(draw: Draw, two: tuple[str, str]) -> None:
    """Hash, format, rank, layers, size of the change and trigger word."""
    (report,) = draw(loras=[{"path": two[0]}]).loras
    assert (report.format, report.rank, report.trigger_words) == ("ai-toolkit", 4, ("zibbo",))
    assert report.layers_matched == report.layers_in_file == len(SHAPES)
    assert report.sha256 is not None
    (half,) = draw(loras=[{"path": two[0], "scale": 0.5}]).loras
    assert half.relative_change == pytest.approx((report.relative_change or 0) / 2, rel=1e-3)


def _wrong(lora_folder: Path) -> dict[str, str]:
    """LoRAs that cannot work here → what the refusal says."""
    wide, _ = loras.ai_toolkit(loras.layers(4096, double=1, single=0), rank=1)
    loras.write(lora_folder / "wide.safetensors", wide)
    deep, _ = loras.ai_toolkit(loras.layers(tiny.HIDDEN, single=5))
    loras.write(lora_folder / "deep.safetensors", deep)
    (lora_folder / "damaged.safetensors").write_bytes(b"no")
    return {
        "wide.safetensors": "FLUX.2-klein 9B (width 4096), and the loaded model is custom-2x2x32",
        "deep.safetensors": "its layer 'single_blocks.2.linear1' is missing there",
        "damaged.safetensors": "damaged",
        "nothing.safetensors": "not in the LoRA folder",
    }


def test_a_failing_lora_is_loud(draw: Draw, lora_folder: Path, two: tuple[str, str]) -> None:
    """`continue` draws without it, keeps the others and says so; `fail` refuses."""
    for path, says in _wrong(lora_folder).items():
        wanted = [{"path": path}, {"path": two[0], "scale": 0.8}]
        result = draw(loras=wanted)
        failed, applied = result.loras
        assert not failed.applied
        assert says in str(failed.error)
        assert applied.applied
        assert any(says in w and "DRAWN WITHOUT A LORA" in w for w in result.warnings)
        assert _bytes(result) == _bytes(draw(loras=wanted[1:]))
        with pytest.raises(LoraError) as caught:
            draw(loras=wanted, lora_error="fail")
        assert says in str(caught.value)


def _broken(pipe: KleinPipeline, wanted: list[dict[str, Any]], **values: Any) -> Job:
    """A job whose first LoRA breaks klein when its third layer is merged."""
    job = make_job(pipe, loras=wanted, **values)
    file, *others = job.loras
    assert isinstance(file, LoraFile)
    patches = list(file.patches)
    odd = {**patches[2].tensors, "down": patches[0].tensors["up"]}
    patches[2] = replace(patches[2], tensors=odd)
    return replace(job, loras=(replace(file, patches=tuple(patches)), *others))


def test_a_lora_that_breaks_klein_breaks_nothing_else(
    draw: Draw, two: tuple[str, str], tiny_pipe: KleinPipeline
) -> None:
    """Half-way through a merge: it is named, the others act as alone, the next picture is clean."""
    bad: dict[str, Any] = {"path": two[0]}
    good = {"path": two[1], "scale": 0.8}
    base, alone = _bytes(draw()), _bytes(draw(loras=[good]))
    for wanted in ([bad, good], [bad]):
        result = draw(_broken(tiny_pipe, wanted))
        broken, *others = result.loras
        assert f"LoRA {two[0]!r} could not be applied, by a fault of klein" in str(broken.error)
        assert any("DRAWN WITHOUT A LORA" in warning for warning in result.warnings)
        assert all(other.applied for other in others)
        assert _bytes(result) == (alone if others else base)
        with pytest.raises(LoraError, match=f"'{two[0]}' could not be applied"):
            draw(_broken(tiny_pipe, wanted, lora_error="fail"))
        assert _bytes(draw()) == base


class _Large(Mapping[str, str]):
    """The tensors of a patch that does not fit into GPU memory."""

    def __getitem__(self, part: str) -> str:
        raise torch.OutOfMemoryError

    def __iter__(self) -> Iterator[str]:
        raise torch.OutOfMemoryError

    def __len__(self) -> int:
        return 2


def test_a_lora_that_does_not_fit_restarts_no_worker(
    draw: Draw, two: tuple[str, str], tiny_pipe: KleinPipeline
) -> None:
    """Memory that runs out over a LoRA, twice, is its error; OutOfMemory would end the worker."""
    base = _bytes(draw())

    def large(**values: Any) -> Job:
        job = make_job(tiny_pipe, loras=[{"path": two[0]}], **values)
        (file,) = job.loras
        assert isinstance(file, LoraFile)
        patches = (replace(file.patches[0], tensors=_Large()), *file.patches[1:])
        return replace(job, loras=(replace(file, patches=patches),))

    with pytest.raises(LoraUnavailable, match=f"'{two[0]}' did not fit into GPU memory, twice"):
        draw(large(lora_error="fail"))
    result = draw(large())
    assert not result.loras[0].applied
    assert _bytes(result) == _bytes(draw()) == base
    assert draw(loras=[{"path": two[0]}]).loras[0].applied


def test_factors_are_counted_before_they_are_read(
    tiny_pipe: KleinPipeline, lora_folder: Path, two: tuple[str, str]
) -> None:
    """One LoRA after the other: the first for which no room is left is named, the others act."""
    library = LoraLibrary(lora_folder)
    files = [library.find(LoraSpec(path)) for path in two]
    room = files[0].identity.size + files[1].identity.size // 2
    merger = LoraMerger(tiny_pipe.parts.transformer, tiny_pipe.info.spec, free=lambda _: left())

    def left() -> int:
        return room - merger.spare_bytes()

    requests = [AdapterRequest(one.name, one, 1.0) for one in files]
    first, second = merger.apply(requests)
    assert first.applied
    assert not second.applied
    assert f"LoRA {two[1]!r} needs 0.0 GB of memory" in str(second.error)
    (alone,) = merger.apply(requests[1:])
    assert alone.applied
    merger.apply([])


def test_factors_are_memory_of_kleins_own(lora_folder: Path, two: tuple[str, str]) -> None:
    """A file that is cut off while it is in use kills no worker, as a mapped one does."""
    path = lora_folder / "cut.safetensors"
    path.write_bytes((lora_folder / two[0]).read_bytes())
    file = inspect(path, path.name)
    tensors = factors.read(file, torch.device("cpu"))
    path.open("wb").close()
    expected, _ = loras.ai_toolkit(SHAPES, rank=4, seed=1, trigger="zibbo")
    assert tensors.keys() == expected.keys()
    assert all(np.array_equal(tensors[name], expected[name]) for name in expected)
    with pytest.raises(LoraUnavailable, match="was replaced"):
        factors.read(file, torch.device("cpu"))


def test_a_file_that_changes_after_its_inspection_is_not_applied(
    draw: Draw, tiny_pipe: KleinPipeline, lora_folder: Path
) -> None:
    """Replaced or deleted while its job waits; and what it was is read again when it is back."""
    path, base = lora_folder / "waits.safetensors", _bytes(draw())
    tensors, _ = loras.ai_toolkit(SHAPES, rank=3, seed=7)
    loras.write(path, tensors)
    whole = path.read_bytes()
    jobs = [make_job(tiny_pipe, loras=[{"path": path.name}], lora_error=x) for x in POLICIES]
    for spoil, says in (
        (lambda: path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1])), "was replaced"),
        (path.unlink, "cannot be read any more"),
    ):
        spoil()
        result = draw(jobs[0])
        assert says in str(result.loras[0].error)
        assert _bytes(result) == base
        with pytest.raises(LoraUnavailable, match=says):
            draw(jobs[1])
    path.write_bytes(whole)
    assert draw(jobs[1]).loras[0].applied


POLICIES = ("continue", "fail")


def test_bf16_files_are_read(draw: Draw, lora_folder: Path) -> None:
    """ai-toolkit saves bfloat16."""
    tensors, _ = loras.ai_toolkit(SHAPES)
    made = {k: torch.from_numpy(v).bfloat16() for k, v in tensors.items()}
    tags = {"ss_tag_frequency": json.dumps({"1_x": {"x": 1}})}
    save_file(made, lora_folder / "bf16.safetensors", tags)
    (report,) = draw(loras=[{"path": "bf16.safetensors"}], lora_error="fail").loras
    assert report.applied
