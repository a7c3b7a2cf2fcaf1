"""nano from one file, in each format that people share, through KLEIN_TRANSFORMER."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers,
)
from torch import Tensor

from klein.core import GenerationResult
from klein.errors import ModelUnavailable
from klein.inference import latents
from klein.inference.acceleration.ops import is_float8_only
from klein.inference.acceleration.transformer import block_linears
from klein.inference.denoise import text_ids
from klein.inference.loading import single_file
from klein.inference.offload import ModelOffloader
from klein.inference.pipeline import KleinPipeline
from klein.models import checkpoint
from klein.models.identify import NANO_FOLDER
from tests.model.conftest import drawer, load, planned, with_loras
from tests.support import checkpoints

LORAS = Path("klein/nano/loras")
ZIBBO = {"path": "zibbo.safetensors", "scale": 1.0}
NANO = checkpoints.nano()
BFL = checkpoints.bfl(NANO)
NOTE = {"format": "float8_e4m3fn"}
PLAIN: dict[str, Mapping[str, Tensor]] = {
    "diffusers": NANO,
    "bfl": BFL,
    "bfl, float32": {name: x.float() for name, x in BFL.items()},
    "all in one": checkpoints.bundle(NANO),
}
FLOAT8: dict[str, Mapping[str, Tensor]] = {
    "scale a layer": checkpoints.float8(BFL, rows=False),
    "scale a row, diffusers": checkpoints.float8(NANO, rows=True),
    "comfy_quant": checkpoints.comfy(BFL, NOTE),
    "scaled_fp8": checkpoints.legacy(BFL),
    "cast": checkpoints.cast(BFL),
    "every linear": checkpoints.float8(BFL, rows=True, every=True),
}
FULL_TEXT = {"KLEIN_TEXT_ENCODER": "bfloat16"}
"""These tests are of the transformer's weights."""
Start = Callable[..., KleinPipeline]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """nano with its transformer from a file of these tensors."""
    folder = tmp_path_factory.mktemp("files")

    def make(tensors: Mapping[str, Tensor], **settings: str) -> KleinPipeline:
        path = checkpoints.write(folder / f"{len(list(folder.iterdir()))}.safetensors", tensors)
        settings = FULL_TEXT | {"KLEIN_TRANSFORMER": str(path)} | settings
        return load("nano", LORAS, None, **settings)

    return make


def drawn(pipe: KleinPipeline, **values: object) -> GenerationResult:
    return drawer(pipe)(prompt="a woman with a green hat", num_inference_steps=3, **values)


def pixels(pipe: KleinPipeline, **values: object) -> np.ndarray:
    return np.asarray(drawn(pipe, **values).images[0].image, dtype=np.int16)


@torch.inference_mode()
def velocities(pipe: KleinPipeline) -> Tensor:
    """The transformer's answer to one prompt and noise at several noise levels."""
    embeddings = pipe.prompts.encode("a woman with a green hat", 128)
    noise = latents.noise(256, 256, 1, embeddings.dtype, embeddings.device)
    given = {"encoder_hidden_states": embeddings, "txt_ids": text_ids(embeddings)}
    given |= {"hidden_states": noise.latents, "img_ids": noise.ids}
    made = (pipe.parts.denoiser(timestep=torch.tensor([t]), **given) for t in (1.0, 0.9, 0.7, 0.3))
    return torch.cat([velocity[0] for velocity in made])


def gap(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).mean())


@pytest.fixture(scope="module")
def eager() -> KleinPipeline:
    return load("nano", LORAS)


@pytest.fixture(scope="module")
def fast() -> KleinPipeline:
    return load("nano", LORAS, None, KLEIN_SPEED="fast", **FULL_TEXT)


@pytest.fixture(scope="module")
def rows(start: Start) -> KleinPipeline:
    """float8 with a scale for each row, quantised as klein quantises."""
    return start(checkpoints.float8(BFL, rows=True), KLEIN_SPEED="fast")


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_file_draws_the_folders_picture(
    name: str, start: Start, eager: KleinPipeline
) -> None:
    """Bit for bit, whoever named its tensors."""
    assert np.array_equal(pixels(start(PLAIN[name])), pixels(eager))


def test_float16_is_rounded_and_no_more(start: Start, eager: KleinPipeline) -> None:
    """It has no room for bfloat16's smallest weights."""
    halves = {name: x.half() for name, x in BFL.items()}
    assert gap(pixels(start(halves)), pixels(eager)) < 1


def test_the_names_are_those_that_diffusers_reads() -> None:
    """The files that these tests write are Black Forest Labs' for diffusers too."""
    theirs = convert_flux2_transformer_checkpoint_to_diffusers(dict(BFL))
    assert theirs.keys() == NANO.keys()
    assert all(torch.equal(theirs[name], NANO[name]) for name in NANO)


def test_float8_rows_are_the_fast_tiers(rows: KleinPipeline, fast: KleinPipeline) -> None:
    """A file quantised as klein quantises is klein's own float8: no bfloat16 is needed for it."""
    assert np.array_equal(pixels(rows), pixels(fast))
    assert all(map(is_float8_only, block_linears(rows.parts.transformer).values()))


@pytest.mark.parametrize("name", FLOAT8)
def test_float8_files_draw_as_fast_does(
    name: str, start: Start, eager: KleinPipeline, fast: KleinPipeline
) -> None:
    """No further from the exact velocities than the fast tier is, but for a tenth: a scale for a
    layer rounds other weights than a scale for a row. A file that is float8 outside of the blocks,
    too, is further away by what that rounds. (Images of few steps would say less: from seed to
    seed, the fast tier's own differ by a factor of two.)"""
    expected = velocities(eager)
    within = float((velocities(fast) - expected).norm() / expected.norm())
    off = float((velocities(start(FLOAT8[name], KLEIN_SPEED="fast")) - expected).norm())
    off /= float(expected.norm())
    print(f"{name}: {off:.4f}, fast {within:.4f}")
    assert 0 < off < (1.5 if name == "every linear" else 1.1) * within
    assert within < 0.06


def test_exact_tiers_make_float8_full_once(start: Start, eager: KleinPipeline) -> None:
    """And say so at the start; what was lost stays lost."""
    tensors = checkpoints.float8(BFL, rows=True)
    pipe = start(tensors, KLEIN_SPEED="eager")
    weights = block_linears(pipe.parts.transformer).values()
    assert {layer.weight.dtype for layer in weights} == {torch.float32}
    assert 0 < gap(pixels(pipe), pixels(eager)) < 20
    notes = planned("nano", KLEIN_TRANSFORMER=str(_written(tensors)))[0].notes
    assert "float8 with a scale for each row" in notes[0]
    assert "taken to be not distilled, as MODEL_ID is" in notes[0]
    assert "turned into full ones once" in notes[-1]


def _written(tensors: Mapping[str, Tensor]) -> Path:
    import tempfile

    return checkpoints.write(Path(tempfile.mkdtemp()) / "nano.safetensors", tensors)


def test_a_partly_quantised_file(start: Start, rows: KleinPipeline) -> None:
    """Blocks that a file keeps in bfloat16 are quantised by klein: a tier is in force whole."""
    first = "double_blocks.0.", "single_blocks.3."
    mixed = {k: x for k, x in checkpoints.float8(BFL, rows=True).items() if not k.startswith(first)}
    pipe = start(
        {**{k: x for k, x in BFL.items() if k.startswith(first)}, **mixed}, KLEIN_SPEED="fast"
    )
    assert np.array_equal(pixels(pipe), pixels(rows))


def test_loras_on_float8_weights(start: Start, fast: KleinPipeline) -> None:
    """They act as on the bfloat16 weights, nearly; the report says into what they were merged; and
    without them the picture is the first one again, though its rows have no scales of their own."""
    pipe = start(FLOAT8["scale a layer"], KLEIN_SPEED="fast")
    before = pixels(pipe)
    result = drawn(pipe, loras=[ZIBBO])
    assert [(x.applied, x.merged_into) for x in result.loras] == [(True, "float8")]
    with_it, expected = pixels(pipe, loras=[ZIBBO]), pixels(fast, loras=[ZIBBO])
    print(f"{gap(with_it, expected):.2f}; the LoRA makes {gap(with_it, before):.2f}")
    assert gap(with_it, expected) < gap(with_it, before) / 2
    assert np.array_equal(pixels(pipe), before)


def test_float8_weights_take_turns_with_the_text_encoder(start: Start, tmp_path: Path) -> None:
    """Model offload moves them as they are, LoRAs are merged from the originals it keeps, and
    pictures are those of weights that stay."""
    tensors = FLOAT8["scale a layer"]
    float8_text = {"KLEIN_TEXT_ENCODER": "auto", "KLEIN_SPEED": "fast"}
    resident = start(tensors, **float8_text)
    parts = start(tensors, **float8_text).parts
    offloader = ModelOffloader("cpu", parts.text_encoder, parts.transformer)
    originals = offloader.originals(parts.transformer)
    kept = {name: weight.clone() for name, weight in originals.items()}
    path = checkpoints.write(tmp_path / "nano.safetensors", tensors)
    chosen = planned("nano", KLEIN_SPEED="fast", KLEIN_TRANSFORMER=str(path))
    pipe = with_loras(KleinPipeline(parts, *chosen, "", offloader), LORAS)
    for seed, loras in ((1, []), (2, [ZIBBO]), (2, [])):
        made, expected = (pixels(x, seed=seed, loras=loras) for x in (pipe, resident))
        assert np.array_equal(made, expected)
    assert all(torch.equal(originals[name].float(), x.float()) for name, x in kept.items())


def test_a_quantised_folder(tmp_path: Path, rows: KleinPipeline) -> None:
    """A folder of diffusers whose configuration names the same quantisation; others are refused."""
    folder = tmp_path / "model"
    shutil.copytree(NANO_FOLDER / "model", folder)
    part = folder / "transformer"
    checkpoints.write(
        part / "diffusion_pytorch_model.safetensors", checkpoints.float8(NANO, rows=True)
    )
    config = json.loads((part / "config.json").read_text())

    def quantised_by(method: str) -> None:
        told = {"quant_method": method, "compute_dtype": "bfloat16"}
        (part / "config.json").write_text(json.dumps(config | {"quantization_config": told}))

    quantised_by("bfl")
    packed = load(folder, LORAS, None, KLEIN_SPEED="fast", **FULL_TEXT)
    assert np.array_equal(pixels(packed), pixels(rows))
    quantised_by("nunchaku_lite")
    with pytest.raises(ModelUnavailable, match=r"MODEL_ID: .* by 'nunchaku_lite': use the bf16"):
        planned(folder)


def test_a_truncated_file_is_refused_at_the_start(tmp_path: Path) -> None:
    """Before anything is loaded."""
    path = checkpoints.write(tmp_path / "nano.safetensors", BFL)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelUnavailable, match="is damaged"):
        planned("nano", KLEIN_TRANSFORMER=str(path))


def test_nothing_is_held_twice(tmp_path: Path) -> None:
    """Pieces of a tensor are memory of their own, read in place: none is a view of a whole."""
    path = checkpoints.write(tmp_path / "nano.safetensors", BFL)
    found = checkpoint.inspect([path], path.name)
    weights = single_file.read(found, "cpu", torch.bfloat16, keep_float8=False)
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in weights.values())
