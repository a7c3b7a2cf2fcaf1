"""What is not finite is an error that names its cause, never an image."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from klein.core import GenerationResult
from klein.errors import InternalError, LoraError
from tests.model.conftest import Draw, drawer, load
from tests.support import loras, tiny
from tests.support.loras import Array

LAYER = "single_blocks.0.linear2"
SHAPES = {LAYER: loras.layers(tiny.HIDDEN)[LAYER]}
GOOD = "finite.safetensors"


def _lora(**changes: Array | float) -> dict[str, Array]:
    """A LoRA of one layer; `changes` are other parts, or one number all through a part."""
    tensors, _ = loras.ai_toolkit(SHAPES)
    for part, value in changes.items():
        name = f"diffusion_model.{LAYER}.{part.replace('__', '.')}"
        whole = isinstance(value, float) and name in tensors
        array = np.full_like(tensors[name], value) if whole else np.asarray(value)
        tensors[name] = array.astype(np.float32)
    return tensors


def _one_nan() -> dict[str, Array]:
    tensors = _lora()
    tensors[f"diffusion_model.{LAYER}.lora_A.weight"][1, 2] = math.nan
    return tensors


def _infinite_dora() -> dict[str, Array]:
    """A DoRA with infinite magnitudes."""
    return _lora(magnitude=np.full(tiny.HIDDEN, math.inf))


BROKEN: dict[str, tuple[Callable[[], dict[str, Array]], str]] = {
    "one NaN": (_one_nan, "lora_A.weight' has NaN or infinity in it"),
    "infinite": (lambda: _lora(lora_B__weight=math.inf), "lora_B.weight' has NaN or infinity"),
    "alpha": (lambda: _lora(alpha=math.nan), "alpha' has NaN or infinity"),
    "DoRA": (_infinite_dora, "magnitude' has NaN or infinity"),
    "too large a product": (
        lambda: _lora(lora_A__weight=3e38, lora_B__weight=3e38),
        "its weight changes are not finite",
    ),
}


def test_float8_with_nan_is_left_out(draw: Draw, lora_folder: Path) -> None:
    """Though torch cannot ask a float8 whether it is finite."""
    path = loras.write(lora_folder / "f8.safetensors", _lora())
    _retype(path, "F8_E4M3", b"\x7f")
    result = draw(loras=[{"path": "f8.safetensors", "scale": 1.0}])
    assert "has NaN or infinity in it" in str(result.loras[0].error)
    assert _bytes(result) == _bytes(draw())


def _retype(path: Path, dtype: str, fill: bytes) -> None:
    """The same tensors in a type of one byte, each value `fill`."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = {k: v for k, v in json.loads(raw[8 : 8 + length]).items() if k != "__metadata__"}
    place = 0
    for row in header.values():
        size = math.prod(row["shape"])
        row |= {"dtype": dtype, "data_offsets": [place, place + size]}
        place += size
    blob = json.dumps(header).encode()
    path.write_bytes(len(blob).to_bytes(8, "little") + blob + fill * place)


def test_finite_weights_that_make_steps_infinite_are_their_loras(
    draw: Draw, lora_folder: Path
) -> None:
    """A fault of the request, not of klein; the next image is as ever."""
    plain = draw()
    every = loras.layers(tiny.HIDDEN)
    tensors, _ = loras.ai_toolkit({n: every[n] for n in every if "single_blocks.0" in n})
    loud = {n: x * np.float32(1e17 if "lora_B" in n else 1) for n, x in tensors.items()}
    loras.write(lora_folder / "loud.safetensors", loud)
    with pytest.raises(LoraError, match=r"'loud\.safetensors': with it step 1 of 2 gave values"):
        draw(loras=[{"path": "loud.safetensors", "scale": 1.0}])
    assert _bytes(draw()) == _bytes(plain)


def test_a_rank_far_above_the_layers_size_takes_no_square_of_it(
    draw: Draw, lora_folder: Path
) -> None:
    """A file of a few megabytes whose factors' own products would take 160 GB."""
    rank, (rows, columns) = 200_000, SHAPES[LAYER]
    up, down = np.zeros((rows, rank), np.float32), np.zeros((rank, columns), np.float32)
    up[0, -1] = down[-1, 0] = 0.5
    loras.write(
        lora_folder / "wide.safetensors",
        _lora(lora_A__weight=down, lora_B__weight=up, alpha=float(rank)),
    )
    (report,) = draw(loras=[{"path": "wide.safetensors", "scale": 1.0}]).loras
    assert (report.applied, report.rank) == (True, rank)
    assert report.relative_change


def _bytes(result: GenerationResult) -> bytes:
    return result.images[0].image.tobytes()


@pytest.mark.parametrize("name", BROKEN)
def test_a_lora_that_is_not_finite_is_left_out(name: str, draw: Draw, lora_folder: Path) -> None:
    """With its file's name; alone and beside a good one, which acts as without it."""
    make, says = BROKEN[name]
    loras.write(lora_folder / "broken.safetensors", make())
    loras.write(lora_folder / GOOD, _lora())
    broken, good = {"path": "broken.safetensors", "scale": 1.0}, {"path": GOOD, "scale": 0.5}
    for asked, alone in (([broken], []), ([broken, good], [good]), ([good, broken], [good])):
        result = draw(loras=asked)
        for report, one in zip(result.loras, asked, strict=True):
            assert report.applied == (one is good)
            assert one is good or says in str(report.error)
        assert any("DRAWN WITHOUT A LORA: LoRA 'broken.safe" in said for said in result.warnings)
        assert _bytes(result) == _bytes(draw(loras=alone))
        with pytest.raises(LoraError, match=r"'broken\.safetensors'"):
            draw(loras=asked, lora_error="fail")
    assert not draw().warnings


@pytest.mark.parametrize(
    ("values", "scale", "says"),
    [
        ({"lora_B__weight": 0.0}, 1.0, "it is zero everywhere"),
        ({}, 0.0, "its scale is 0"),
        ({}, 1e-300, "its scale is 1e-300"),
    ],
)
def test_a_lora_that_changes_nothing_says_so(
    values: dict[str, float], scale: float, says: str, draw: Draw, lora_folder: Path
) -> None:
    """It is applied, and the image is that of none."""
    loras.write(lora_folder / "idle.safetensors", _lora(**values))
    result = draw(loras=[{"path": "idle.safetensors", "scale": scale}])
    assert result.loras[0].applied
    assert result.warnings == (f"LoRA 'idle.safetensors' changes nothing: {says}",)
    assert _bytes(result) == _bytes(draw())
    loras.write(lora_folder / GOOD, _lora())
    assert not draw(loras=[{"path": GOOD, "scale": 0.5}]).warnings


def _spoiled(tiny_folder: Path, part: str, weight: Callable[[Any], Any]) -> Draw:
    pipe = load(tiny_folder)
    weight(getattr(pipe.parts, part)).data.fill_(math.nan)
    return drawer(pipe)


def test_a_decoder_that_gives_nan_is_an_error(tiny_folder: Path) -> None:
    """It is named; the latents were sound."""
    draw = _spoiled(tiny_folder, "vae", lambda vae: vae.decoder.conv_out.bias)
    with pytest.raises(InternalError, match="the VAE decoded finite latents to values that are"):
        draw()


def test_a_transformer_that_gives_nan_is_an_error(tiny_folder: Path) -> None:
    """With the step."""
    draw = _spoiled(tiny_folder, "transformer", lambda model: model.proj_out.weight)
    with pytest.raises(InternalError, match="step 1 of 2 gave values that are not finite"):
        draw()
