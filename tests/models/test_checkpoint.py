"""What files of a transformer are recognised as, from their headers alone; no torch."""

import json
import math
import os
import random
import struct
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from klein.errors import ModelUnavailable
from klein.models import checkpoint, layers
from klein.models.catalog import MODELS, ModelSpec
from klein.models.checkpoint import Checkpoint
from klein.models.identify import NANO_FOLDER
from klein.sources import safetensors
from klein.sources.safetensors import ITEM_BYTES, Entry

NANO = NANO_FOLDER / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
LAYER = "transformer_blocks.0.attn.to_q"
SCALE = Entry(f"{LAYER}.weight_scale", "F32", (192,), 0, 768)
Entries = list[Entry]


def nano() -> Entries:
    with NANO.open("rb") as file:
        return list(safetensors.read(file).entries)


def changed(tensor: str, /, **values: object) -> Callable[[Entries], Entries]:
    """That tensor with another name, type or shape."""

    def change(entries: Entries) -> Entries:
        made = []
        for entry in entries:
            own = {key: getattr(entry, key) for key in ("name", "dtype", "shape", "begin", "end")}
            made.append(Entry(**(own | values)) if entry.name == tensor else entry)
        return made

    return change


def added(*more: Entry) -> Callable[[Entries], Entries]:
    return lambda entries: [*entries, *more]


def tensor(name: str, shape: tuple[int, ...] = (4, 4), dtype: str = "BF16") -> Entry:
    return Entry(name, dtype, shape, 0, math.prod(shape) * ITEM_BYTES[dtype])


def of_shapes(spec: ModelSpec, context: int) -> Entries:
    """A header of that model by diffusers' names."""
    width = spec.hidden
    outside = {
        "x_embedder": (width, 128),
        "context_embedder": (width, context),
        "time_guidance_embed.timestep_embedder.linear_1": (width, 256),
        "proj_out": (128, width),
    }
    made = []
    for module in layers.modules(spec.double_blocks, spec.single_blocks):
        shape: tuple[int, ...] = outside.get(module) or layers.shape(module, width) or ()
        made.append(tensor(f"{module}.weight", (128,) if ".norm_" in module else shape))
    return made


def recognised(entries: Iterable[Entry]) -> Checkpoint:
    return checkpoint.recognise(entries, "x.safetensors")


def test_nano_is_recognised() -> None:
    """By its shapes, with nothing left over."""
    found = recognised(nano())
    assert (found.width, found.double_blocks, found.single_blocks) == (192, 2, 4)
    assert (found.numbers, found.float8, found.notes) == ("bfloat16", False, ())
    assert found.spec(MODELS["nano"])[0] is MODELS["nano"]


def test_the_sizes_of_the_catalog_are_those_of_the_shapes() -> None:
    """Every byte of 9B and 4B is accounted for, so no layer is forgotten."""
    for name, context in (("klein-base-9B", 12288), ("klein-base-4B", 7680)):
        entries = of_shapes(MODELS[name], context)
        assert sum(entry.end for entry in entries) == MODELS[name].transformer_bytes
        assert recognised(entries).spec(MODELS[name])[0] is MODELS[name]


def test_base_and_distilled_are_told_apart_by_their_hash_or_not_at_all() -> None:
    """Their shapes are the same: what was assumed is said."""
    found = recognised(of_shapes(MODELS["klein-base-9B"], 12288))
    spec, said = found.spec(MODELS["klein-9B"])
    assert (spec.name, said) == (
        "klein-9B",
        "taken to be distilled, as MODEL_ID is: its shapes do not tell",
    )
    distilled = Checkpoint(
        "x", 4096, 8, 24, "bfloat16", found.tensors, sha256="0975d6b7" + 56 * "0"
    )
    assert distilled.spec(MODELS["klein-base-9B"]) == (
        MODELS["klein-9B"],
        "klein-9B by its sha256",
    )


@pytest.mark.parametrize(
    ("own", "asked", "says"),
    [
        ("klein-base-4B", "klein-base-9B", "is of klein-base-4B, .* set MODEL_ID=klein-base-4B"),
        ("klein-base-9B", "klein-4B", "is of klein-9B, .* set MODEL_ID=klein-9B"),
        ("nano", "klein-base-9B", "is of nano"),
    ],
)
def test_another_klein_is_named(own: str, asked: str, says: str) -> None:
    """With the setting that fits it."""
    with pytest.raises(ModelUnavailable, match=says):
        recognised(of_shapes(MODELS[own], 96)).spec(MODELS[asked])


FP8 = changed(f"{LAYER}.weight", dtype="F8_E4M3")
REFUSED: dict[str, tuple[Callable[[Entries], Entries], str]] = {
    "cut off": (lambda x: x[:-1], "is not whole: it lacks 1 tensors"),
    "no block": (lambda x: [e for e in x if "blocks.0" not in e.name], "is not whole"),
    "empty": (lambda x: [], "holds no transformer"),
    "only a mark": (lambda x: [tensor("scaled_fp8", (0,))], "holds no transformer"),
    "renamed": (changed(f"{LAYER}.weight", name="blocks.q"), "1 of its 57 tensors are unknown"),
    "twice": (added(tensor(f"transformer.{LAYER}.weight")), "twice, under two prefixes"),
    "both spellings": (
        added(tensor("img_in.weight", (192, 128))),
        "'x_embedder.weight' twice, by the names of two formats",
    ),
    "mixed widths": (changed(f"{LAYER}.weight", shape=(96, 192)), "no transformer of one width"),
    "a biased layer": (added(tensor(f"{LAYER}.bias")), "unknown there"),
    "integers": (changed(f"{LAYER}.weight", dtype="I64"), "unknown there"),
    "FLUX.1": (added(tensor("double_blocks.0.img_mod.lin.weight")), "is of FLUX.1; klein takes"),
    "FLUX.2-dev": (added(tensor("guidance_in.in_layer.weight")), "is of FLUX.2-dev"),
    "SDXL": (lambda x: [tensor("input_blocks.1.0.weight")], "is of Stable Diffusion or SDXL"),
    "Z-Image": (lambda x: [tensor("noise_refiner.0.attention.qkv.weight")], "Z-Image"),
    "a LoRA": (lambda x: [tensor(f"{LAYER}.lora_A.weight")], "is a LoRA: name it in"),
    "a text encoder": (lambda x: [tensor("model.layers.0.mlp.up_proj.weight")], "a text encoder"),
    "a VAE": (lambda x: [tensor("decoder.conv_in.weight")], "is a VAE"),
    "NVFP4": (added(tensor(f"{LAYER}.weight_scale_2")), "is in NVFP4, .*: use the bf16 file"),
    "int8": (changed(f"{LAYER}.weight", dtype="I8"), "is in int8, .* or the float8"),
    "4 bits": (changed(f"{LAYER}.weight", dtype="U8"), "is in 4 bits"),
    "SVDQuant": (added(tensor(f"{LAYER}.qweight")), "is in SVDQuant or AWQ"),
    "bitsandbytes": (added(tensor(f"{LAYER}.weight.quant_state.bnb")), "bitsandbytes' 4 bits"),
    "e5m2": (changed(f"{LAYER}.weight", dtype="F8_E5M2"), "is in float8_e5m2"),
    "MXFP8": (lambda x: FP8([*x, tensor(SCALE.name, (192, 6), "F32")]), "scales by block"),
    "a scaled bf16": (added(SCALE), "is in bfloat16 with scales"),
    "odd scales": (lambda x: FP8([*x, tensor(SCALE.name, (192,), "U8")]), "scales of type U8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_klein_cannot_use_is_refused(case: str) -> None:
    """In one sentence that says what it is, or what to use."""
    change, says = REFUSED[case]
    with pytest.raises(ModelUnavailable, match=says) as caught:
        recognised(change(nano()))
    assert_one_sentence(caught.value)


def assert_one_sentence(error: ModelUnavailable) -> None:
    assert error.field == "KLEIN_TRANSFORMER"
    assert str(error).startswith("KLEIN_TRANSFORMER: x.safetensors ")
    assert len(str(error)) < 400
    assert str(error).isprintable()


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"format": "nvfp4"}, "is in 'nvfp4'"),
        ({"format": "float8_e4m3fn", "convrot_groupsize": 256}, r"transformed \(convrot_groupsize"),
        ("float8", "is in 'float8'"),
    ],
)
def test_comfyuis_notes_are_heeded(told: object, says: str) -> None:
    """float8 weights that were rotated are none to multiply with."""
    with pytest.raises(ModelUnavailable, match=says):
        checkpoint.recognise(FP8(nano()), "x.safetensors", {LAYER: told})


def test_what_is_bundled_is_left_alone() -> None:
    """A text encoder and a VAE beside the transformer are named and not read."""
    inside = [
        Entry(f"model.diffusion_model.{e.name}", e.dtype, e.shape, e.begin, e.end) for e in nano()
    ]
    more = [tensor("text_encoders.qwen.model.layers.0.weight", dtype="U8"), tensor("vae.x.weight")]
    notes = {"text_encoders.qwen.model.layers.0.comfy_quant": {"format": "nvfp4"}}
    found = checkpoint.recognise([*inside, *more], "x.safetensors", notes)
    assert [note.split(" in ")[0] for note in found.notes] == ["the text encoder", "the VAE"]
    assert len(found.tensors) == len(inside)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is damaged"),
        (b"GGUF" + bytes(60), "is in GGUF, .* use the bf16 file"),
        (b"PK\x03\x04" + bytes(60), "is damaged: it is not a safetensors file"),
        (NANO.read_bytes()[:-1], "is damaged: .* download it again"),
    ],
)
def test_files_that_are_no_whole_safetensors(tmp_path: Path, content: bytes, says: str) -> None:
    """GGUF and pickles are told apart from a broken download."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelUnavailable, match=says):
        checkpoint.inspect([path], path.name)


def _mutated(entries: Entries, rng: random.Random) -> Entries:
    """A few tensors dropped, doubled, renamed, or with another type or shape."""
    entries = list(entries)
    words = [
        *checkpoint.QUANTISED,
        *checkpoint.SCALES,
        *checkpoint.UNUSED,
        "weight",
        "scale",
        "bias",
    ]
    for _ in range(rng.randint(1, 4)):
        if not entries:
            return entries
        at = rng.randrange(len(entries))
        old = entries[at]
        layer = old.name.rpartition(".")[0]
        name = rng.choice(
            (
                old.name,
                f"{layer}.{rng.choice(words)}",
                rng.choice((*checkpoint.PREFIXES, *checkpoint.BUNDLED)) + old.name,
                old.name.replace("0", str(rng.choice((1, 7, 63, 64, 10**9)))),
                "".join(rng.choices("abc._0 é", k=rng.randint(0, 9))),
            )
        )
        shape = rng.choice((old.shape, old.shape[::-1], (), (0,), (1,), old.shape[:1], (3, 5, 7)))
        new = Entry(name, rng.choice((old.dtype, *ITEM_BYTES)), shape, old.begin, old.end)
        entries = rng.choice(
            (
                entries[:at] + entries[at + 1 :],
                [*entries, new],
                [*entries[:at], new, *entries[at + 1 :]],
            )
        )
    return entries


def test_a_mutated_header_is_whole_or_refused() -> None:
    """Whatever a header holds: the model's parameters, each once and of its own shape, or one
    sentence. FUZZ_SECONDS makes it longer."""
    ends = time.monotonic() + float(os.environ.get("FUZZ_SECONDS", "1"))
    clean, rng = nano(), random.Random(1)
    shapes = {entry.name: entry.shape for entry in clean}
    kept = refused = 0
    while time.monotonic() < ends or not (kept and refused):
        entries = _mutated(clean, rng)
        try:
            found = recognised(entries)
        except ModelUnavailable as error:
            assert_one_sentence(error)
            refused += 1
            continue
        kept += 1
        by_name = {entry.name: entry for entry in entries}
        made: dict[str, tuple[int, ...]] = {}
        for name, stored in found.tensors.items():
            for parameter, rows in stored.parameters:
                assert parameter not in made
                made[parameter] = (rows, *by_name[name].shape[1:])
        own = (found.double_blocks, found.single_blocks)
        if own == (2, 4) and found.width == 192:
            outside = ("x_embedder", "context_embedder", "proj_out", "linear_1", ".norm_")
            for parameter, shape in shapes.items():
                assert made[parameter] == shape or any(x in parameter for x in outside)
    print(f"{refused} refused, {kept} kept")


def test_a_mutated_file_is_whole_or_refused(tmp_path: Path) -> None:
    """Bytes of the header changed at random, as a damaged disk does."""
    ends = time.monotonic() + float(os.environ.get("FUZZ_SECONDS", "1"))
    rng, whole = random.Random(2), NANO.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    small = {name: row for name, row in header.items() if "blocks" not in name}
    small["single_blocks.0.linear1.comfy_quant"] = {
        "dtype": "U8",
        "shape": [20],
        "data_offsets": [0, 20],
    }
    path = tmp_path / "x.safetensors"
    while time.monotonic() < ends:
        raw = bytearray(json.dumps(rng.choice((header, small))).encode())
        for _ in range(rng.randint(0, 6)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(100))
        with pytest.raises(ModelUnavailable) as caught:
            checkpoint.inspect([path], "x.safetensors")
        assert_one_sentence(caught.value)
