import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klein.errors import LoraError
from klein.lora import file, keys
from klein.models.layers import modules_by_layer
from klein.sources import safetensors
from tests.support import loras


def _save(tmp_path: Path, tensors: dict[str, loras.Array], **metadata: str) -> Path:
    return loras.write(tmp_path / "x.safetensors", tensors, metadata or None)


def test_an_ai_toolkit_file_is_known_whole(tmp_path: Path) -> None:
    """Format, rank, width, trigger word and every layer, from the header alone."""
    tensors, metadata = loras.ai_toolkit(loras.layers(32), rank=4, trigger="zibbo")
    found = file.inspect(_save(tmp_path, tensors, **metadata), "x.safetensors")
    assert (found.format, found.rank, found.hidden) == ("ai-toolkit", 4, 32)
    assert found.trigger_words == ("zibbo",)
    assert len(found.patches) == len(loras.layers(32))
    assert len(found.sha256) == 64


@pytest.mark.parametrize("prefix", ["", *keys.PREFIXES, "base_model.model.transformer."])
def test_every_prefix_names_the_same_layers(tmp_path: Path, prefix: str) -> None:
    """With dots or underscores, BFL's names come out as diffusers' modules."""
    layer, modules = "double_blocks.1.img_attn.qkv", ["to_q", "to_k", "to_v"]
    if prefix.startswith("lora_"):
        layer = layer.replace(".", "_")
    parts = {
        f"{prefix}{layer}.lora_down.weight": loras.random((4, 32), 1),
        f"{prefix}{layer}.lora_up.weight": loras.random((96, 4), 2),
        f"{prefix}{layer}.alpha": loras.random((1,), 3),
    }
    (patch,) = file.inspect(_save(tmp_path, parts), "x").patches
    assert patch.modules == tuple(f"transformer_blocks.1.attn.{m}" for m in modules)
    assert set(patch.tensors) == {"down", "up", "alpha"}


def test_diffusers_names_name_themselves() -> None:
    """And all spellings of all layers lead somewhere."""
    table = modules_by_layer()
    assert table["transformer_blocks.0.attn.to_q"] == ("transformer_blocks.0.attn.to_q",)
    assert table["single_transformer_blocks_3_attn_to_out"] == (
        "single_transformer_blocks.3.attn.to_out",
    )


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"transformer.norm.weight": (4,)}, "none of a LoRA's tensors"),
        (
            {"lora_unet_foo.lora_down.weight": (4, 8), "lora_unet_foo.lora_up.weight": (8, 4)},
            "not for FLUX.2",
        ),
        (
            {
                "lora_unet_double_blocks_0_img_mod_lin.lora_down.weight": (4, 8),
                "lora_unet_double_blocks_0_img_mod_lin.lora_up.weight": (8, 4),
            },
            "FLUX.1",
        ),
        (
            {
                "diffusion_model.single_blocks.0.linear1.lora_A.weight": (4, 8),
                "diffusion_model.single_blocks.0.linear1.lora_B.weight": (56, 4),
            },
            "FLUX.1",
        ),
        ({"diffusion_model.single_blocks.0.linear1.lora_A.weight": (4, 8)}, "do not fit"),
        (
            {
                "diffusion_model.single_blocks.0.linear1.lora_A.weight": (4, 8),
                "diffusion_model.single_blocks.0.linear1.lora_B.weight": (72, 5),
            },
            "do not fit",
        ),
        (
            {
                "diffusion_model.single_blocks.0.linear1.lora_A.weight": (4, 8),
                "diffusion_model.single_blocks.0.linear1.lora_B.weight": (72, 4),
                "diffusion_model.single_blocks.1.linear1.lora_A.weight": (4, 16),
                "diffusion_model.single_blocks.1.linear1.lora_B.weight": (144, 4),
            },
            "different models",
        ),
        ({"diffusion_model.single_blocks.0.linear1.alpha": (1,)}, "has only alpha"),
        (
            {
                "diffusion_model.single_blocks.0.linear1.lora_A.weight": (4, 8),
                "diffusion_model.single_blocks.0.linear1.lora_B.weight": (72, 4),
                "diffusion_model.single_blocks.0.linear1.alpha": (2,),
            },
            "do not fit",
        ),
        (
            {
                "diffusion_model.single_blocks.0.linear1.lora_A.weight": (4, 8),
                "diffusion_model.single_blocks.0.linear1.lora_B.weight": (72, 4),
                "diffusion_model.single_blocks.0.linear1.dora_scale": (1, 8),
            },
            "do not fit",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(
    tmp_path: Path, tensors: dict[str, tuple[int, ...]], says: str
) -> None:
    """Never a LoRA that silently does nothing."""
    made = {name: loras.random(shape, 0) for name, shape in tensors.items()}
    with pytest.raises(LoraError, match=r"LoRA 'x\.safetensors'") as caught:
        file.inspect(_save(tmp_path, made), "x.safetensors")
    assert says in str(caught.value)


def _bytes(tmp_path: Path) -> bytes:
    tensors, _ = loras.ai_toolkit({"single_blocks.0.linear1": (72, 8)})
    return _save(tmp_path, tensors).read_bytes()


def _header(entries: object, data: bytes = b"") -> bytes:
    blob = json.dumps(entries).encode()
    return len(blob).to_bytes(8, "little") + blob + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04\x95pickle",
        (2**40).to_bytes(8, "little") + b"{}",
        _header([]),
        _header({}),
        _header({"a": 1}),
        _header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"0000"),
        _header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}),
        _header({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, b"0000"),
        _header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"00"),
        _header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"00000000"),
        _header({"__metadata__": 3}),
        b"\x05\x00\x00\x00\x00\x00\x00\x00{bad}",
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, data: bytes) -> None:
    """One sentence, whatever the damage."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(LoraError, match=r"'x\.safetensors' is damaged"):
        file.inspect(path, path.name)


def test_a_cut_off_download_is_refused(tmp_path: Path) -> None:
    """At any byte."""
    whole, path = _bytes(tmp_path), tmp_path / "cut.safetensors"
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with path.open("rb") as opened, pytest.raises(safetensors.Damaged):
            safetensors.read(opened)


@given(st.data())
def test_no_bytes_break_the_reader(tmp_path: Path, data: st.DataObject) -> None:
    """Mutated files are read or refused; nothing else ever comes out.

    `--hypothesis-profile=long` tries 30,000 of them.
    """
    raw = bytearray(_bytes(tmp_path))
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, min(len(raw) - 1, 400)))] = data.draw(st.integers(0, 255))
    path = tmp_path / "mutated.safetensors"
    path.write_bytes(bytes(raw))
    with contextlib.suppress(LoraError):
        file.inspect(path, "mutated")


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ("oft_blocks", "in the OFT or BOFT form of LyCORIS, which klein does not apply"),
        ("oft_diag", "in the OFT form of kohya's trainer"),
        ("set_weight", "a whole weight"),
        ("lora_mid.weight", "in the convolution form"),
        ("a1.weight", "a GLoRA"),
        ("reshape_weight", "reshaped"),
    ],
)
def test_what_is_known_and_not_applied_is_named(tmp_path: Path, part: str, says: str) -> None:
    """Rather than called a LoRA of another model."""
    layer = "diffusion_model.single_blocks.0.linear1"
    made = {f"{layer}.{part}": loras.random((8, 8), 0)}
    with pytest.raises(LoraError, match=r"layer 'single_blocks\.0\.linear1' is") as caught:
        file.inspect(_save(tmp_path, made), "x")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "shape",
    [(4, 27), (4, 0), (0, 28), (28,)],
)
def test_an_oft_of_no_block_size_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """The upper triangle of a square has 1, 3, 6, … elements."""
    made = {"transformer.norm_out.linear.oft_R.weight": loras.random(shape, 0)}
    with pytest.raises(LoraError, match="do not fit together"):
        file.inspect(_save(tmp_path, made), "x")


def test_two_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    """Nobody could say which of them acts."""
    made = {
        f"transformer.transformer_blocks.0.attn.to_q.lora_{part}.{adapter}.weight": loras.random(
            (4, 4), 0
        )
        for adapter in ("anna", "bob")
        for part in "AB"
    }
    with pytest.raises(LoraError, match="holds two adapters"):
        file.inspect(_save(tmp_path, made), "x")


def test_text_encoders_are_left_out(tmp_path: Path) -> None:
    """Counted where the file has a LoRA beside them, refused by name where it has none."""
    tensors, _ = loras.ai_toolkit({"single_blocks.0.linear1": (72, 8)})
    text = {
        f"{name}.lora_{part}.weight": loras.random((4, 4), 0)
        for name in ("lora_te1_text_model_x", "text_encoders.qwen3.x", "text_encoder.x", "te.x")
        for part in ("up", "down")
    }
    found = file.inspect(_save(tmp_path, tensors | text), "x")
    assert (len(found.patches), found.left_out) == (1, 8)
    with pytest.raises(LoraError, match="'x' changes only a text encoder"):
        file.inspect(_save(tmp_path, text), "x")
