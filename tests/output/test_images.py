import io

import numpy as np
import pytest
from PIL import Image, ImageChops

from klein.errors import InvalidRequest
from klein.output import images
from klein.request.formats import FORMATS

TEXT = "a café, “quoted” 木\nNegative prompt: 😀\nSteps: 1"


def _gradient() -> Image.Image:
    return Image.linear_gradient("L").resize((96, 64)).convert("RGB")


@pytest.mark.parametrize("name", FORMATS)
def test_text_survives_in_every_format(name: str) -> None:
    """Any text, in the place where other tools look, in a file of the right type."""
    data = images.encode(_gradient(), FORMATS[name], 90, TEXT)
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == name.upper()
        assert image.size == (96, 64)
    assert images.read_text(data) == TEXT


@pytest.mark.parametrize("name", FORMATS)
def test_quality(name: str) -> None:
    """It acts where the table says so; png and webp at 100 lose nothing."""
    low, high = (images.encode(_gradient(), FORMATS[name], q, TEXT) for q in (20, 100))
    assert (low != high) == FORMATS[name].quality
    with Image.open(io.BytesIO(high)) as image:
        worst = int(np.asarray(ImageChops.difference(image, _gradient())).max())
    assert worst <= (4 if name == "jpeg" else 0)


@pytest.mark.parametrize("data", [b"", b"no picture", b"\x89PNG\r\n\x1a\nbroken"])
def test_no_picture_is_said(data: bytes) -> None:
    """Not a traceback."""
    with pytest.raises(InvalidRequest, match="not a picture"):
        images.read_text(data)


def test_a_picture_without_parameters_is_said() -> None:
    """Another program's picture."""
    out = io.BytesIO()
    _gradient().save(out, "PNG")
    with pytest.raises(InvalidRequest, match="no generation parameters"):
        images.read_text(out.getvalue())
