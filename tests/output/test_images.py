import io

import numpy as np
import pytest
from PIL import Image, ImageChops

from klein import pixels
from klein.errors import InvalidRequest, OutputTooLarge
from klein.output import images
from klein.request import images as request_images
from klein.request.formats import FORMATS
from tests.support import pictures

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


def _with_comment(comment: bytes) -> bytes:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = comment
    return pictures.data(_gradient(), "JPEG", exif=exif)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no picture",
        b"\x89PNG\r\n\x1a\nbroken",
        _with_comment(b"UNICODE\0\xd8\0\0a"),
        pictures.data(_gradient()).replace(b"\0\xaaIDAT", b"\0\x20IDAT"),
        pictures.data(Image.new("1", (20_000, 20_000))),
    ],
    ids=["empty", "text", "head", "half a pair", "cut chunk", "bomb"],
)
def test_no_picture_is_said(data: bytes) -> None:
    """Whatever the decoders raise for it."""
    with pytest.raises(InvalidRequest, match="not a picture"):
        images.read_text(data)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("sent", ["PNG", "JPEG", "WEBP"])
def test_nothing_of_the_file_that_was_sent_leaves(sent: str, name: str) -> None:
    """A repainted picture has its pixels, and neither its colour profile, which were ignored when
    they were read, nor its comment, camera or XMP."""
    look = _gradient()
    options = {"icc_profile": b"anna" * 40, "comment": b"anna", "xmp": b"anna", "dpi": (99, 99)}
    picture = request_images.decode(pictures.data(look, sent, **options), "init_image")
    mask = pictures.spot(96, 64, (8, 8, 32, 32))
    repaint = pixels.repaint(picture.rgb, mask, (0, 0, 96, 64), (96, 64), 0)
    image, _ = repaint.put_back(look)
    bare = Image.fromarray(np.asarray(image))
    assert images.encode(image, FORMATS[name], 90, TEXT) == images.encode(
        bare, FORMATS[name], 90, TEXT
    )
    assert images.preview_uri(image, b"") == images.preview_uri(bare, b"")


def test_a_text_that_a_jpeg_cannot_hold_is_said() -> None:
    """The other formats hold it."""
    text = "x" * 40_000
    with pytest.raises(OutputTooLarge, match="png or webp"):
        images.encode(_gradient(), FORMATS["jpeg"], 90, text)
    for name in ("png", "webp"):
        assert images.read_text(images.encode(_gradient(), FORMATS[name], 90, text)) == text


def test_a_picture_without_parameters_is_said() -> None:
    """Another program's picture."""
    out = io.BytesIO()
    _gradient().save(out, "PNG")
    with pytest.raises(InvalidRequest, match="no generation parameters"):
        images.read_text(out.getvalue())
