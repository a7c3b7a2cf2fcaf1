"""In the eager tier on a CPU every image is Flux2KleinPipeline's, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from klein.models.identify import NANO_FOLDER
from klein.request.presets import PRESETS
from tests.model.conftest import Draw, drawer, load
from tests.model.stock import stock, stock_image

CASES: dict[str, dict[str, Any]] = {
    "guided": {},
    "unguided": {"guidance_scale": 1.0},
    "no guidance at all": {"guidance_scale": 0.0},
    "strong guidance, negative prompt": {"guidance_scale": 7.5, "negative_prompt": "blue"},
    "one step": {"num_inference_steps": 1},
    "many steps": {"num_inference_steps": 31},
    "portrait": {"width": 64, "height": 160},
    "odd size": {"width": 208, "height": 112},
    "batch": {"num_images": 3, "seed": 7},
    "long prompt": {"prompt": "word " * 60},
    "above the limit of bfl": {"width": 1056, "height": 1056, "num_inference_steps": 1},
    "ai_toolkit": {"schedule": "ai_toolkit", "num_inference_steps": 7},
    "linear": {"schedule": "linear", "num_inference_steps": 7},
    "mu": {"schedule": 3.7, "num_inference_steps": 7},
    **{
        f"preset {name}": {"preset": name, "num_inference_steps": None, "max_sequence_length": None}
        for name, preset in PRESETS.items()
        if preset.sampler == "euler"
    },
}


def _assert_stock(draw: Draw, pipe: Any, **values: Any) -> None:
    result = draw(**values)
    assert len(result.images) == result.params.num_images
    for number, one in enumerate(result.images):
        assert one.image.tobytes() == stock_image(pipe, result.params, number), number


@pytest.fixture(scope="module")
def tiny_stock(tiny_folder: Path) -> Any:
    return stock(tiny_folder)


@pytest.mark.parametrize("name", CASES)
def test_images_are_stock(name: str, draw: Draw, tiny_stock: Any) -> None:
    """With the text encoder cut, and klein's own loop."""
    _assert_stock(draw, tiny_stock, **CASES[name])


NANO: tuple[dict[str, Any], ...] = (
    {"prompt": "a woman with a green hat", "num_inference_steps": 6},
    {"prompt": "a man", "width": 192, "height": 128, "guidance_scale": 1, "schedule": 2.0},
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nano_is_stock(dtype: torch.dtype) -> None:
    """On trained weights too; and in bfloat16, where every rounding shows."""
    draw, pipe = drawer(load("nano", dtype=dtype)), stock(NANO_FOLDER / "model", dtype)
    for values in NANO:
        _assert_stock(draw, pipe, **values)


def test_what_differs_is_seen(draw: Draw, tiny_stock: Any) -> None:
    """Another seed, prompt, guidance or step count is another image: the comparison can fail."""
    params = draw().params
    images = {stock_image(tiny_stock, params)}
    for values in ({"seed": 2}, {"prompt": "x"}, {"guidance_scale": 3.0}, {"num_images": 1}):
        images.add(draw(**values).images[0].image.tobytes())
    assert len(images) == 4
