import base64
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from klein.errors import InvalidRequest
from klein.request import images
from tests.support import pictures

RED = Image.new("RGB", (80, 64), "red")
TURNED = Image.Exif()
TURNED[0x0112] = 6  # turn right to stand upright


def _decode(image: Image.Image, fmt: str = "PNG", **options: Any) -> images.Picture:
    return images.decode(pictures.data(image, fmt, **options), "images.0")


@pytest.mark.parametrize("fmt", ["PNG", "WEBP"])
def test_pixels_arrive_as_they_are(fmt: str) -> None:
    """Bit for bit from lossless files."""
    sent = pictures.noise(100, 70)
    assert _decode(sent, fmt, lossless=True).rgb.tobytes() == sent.tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_mode_of_png(mode: str) -> None:
    """White stays white, black black, whatever a file calls them."""
    sent = Image.new("L", (80, 64))
    sent.paste(255, (40, 0, 80, 64))
    if mode == "I;16":
        made = Image.fromarray(np.asarray(sent).astype(np.uint16) * 257)
    else:
        made = sent.convert(mode)
    read = _decode(made).rgb
    assert read.mode == "RGB"
    assert read.getpixel((10, 10)) == (0, 0, 0)
    assert read.getpixel((70, 10)) == (255, 255, 255)


def test_sixteen_bits_are_shared_out_evenly() -> None:
    """A grey of a half is a half, not white, and the result says what was lost."""
    read = _decode(Image.fromarray(np.full((64, 64), 0x8000, np.uint16)))
    assert read.rgb.getpixel((0, 0)) == (128, 128, 128)
    assert read.notes == ("its 16 bits a channel were read as 8",)


def test_cmyk_and_profiles_are_told() -> None:
    """Values are taken as sRGB; sRGB's own profile is nothing to tell."""
    read = _decode(RED.convert("CMYK"), "JPEG")
    assert np.abs(np.asarray(read.rgb, int) - (255, 0, 0)).max() < 8
    assert "CMYK" in read.notes[0]
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert _decode(RED, icc_profile=srgb).notes == ()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert "profile" in _decode(RED, icc_profile=lab).notes[0]


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP"])
def test_exif_rotation_is_honoured(fmt: str) -> None:
    """The picture is what a viewer shows."""
    read = _decode(pictures.spot(80, 64, (0, 0, 80, 8)), fmt, exif=TURNED)
    assert read.image.size == (64, 80)
    assert read.rgb.getpixel((60, 40))[0] > 200  # type: ignore[index]
    assert read.rgb.getpixel((5, 40))[0] < 50  # type: ignore[index]


def test_transparent_parts_are_put_on_white() -> None:
    """Opaque pixels stay bit for bit; a hidden colour does not show."""
    sent = pictures.noise(80, 64).convert("RGBA")
    sent.paste((9, 9, 9, 0), (0, 0, 80, 32))
    read = _decode(sent).rgb
    assert read.getpixel((3, 3)) == (255, 255, 255)
    below = (0, 32, 80, 64)
    assert read.crop(below).tobytes() == sent.convert("RGB").crop(below).tobytes()


def test_masks_are_white_or_transparent() -> None:
    """With something transparent, that is repainted; else what is white, also in opaque RGBA."""
    spot = pictures.spot(80, 64, (8, 8, 24, 24))
    hole = Image.new("RGBA", (80, 64), "white")
    hole.paste((255, 255, 255, 0), (8, 8, 24, 24))
    for sent in (spot, spot.convert("RGBA"), hole):
        assert _decode(sent).mask.tobytes() == spot.tobytes()
    assert set(_decode(pictures.noise(64, 64)).mask.tobytes()) == {0, 255}


def test_sha256_is_that_of_the_bytes() -> None:
    """Not of the pixels: the same file is the same picture."""
    sent = pictures.data(RED)
    assert images.decode(sent, "x").sha256 == __import__("hashlib").sha256(sent).hexdigest()


@pytest.mark.parametrize("head", ["", "data:image/png;base64,", "DATA:IMAGE/JPG;BASE64,"])
def test_base64_and_data_uris(head: str) -> None:
    """The bytes decide the format; what a data URI calls them is only checked to be a picture."""
    assert images.from_text(head + base64.b64encode(b"abc").decode(), "mask") == b"abc"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("/etc/passwd", "neither an https address"),
        ("YW\nJj", "without line breaks"),
        ("YWJ", "neither"),
        ("YW_j", "neither"),
        ("é", "neither"),
        ("data:image/png,abc", "begins with data:image/png;base64,"),
        ("data:image/gif;base64,YWJj", "known are image/png"),
        ("data:text/html;base64,YWJj", "'text/html'"),
        ("file:///etc/passwd", "neither"),
    ],
)
def test_other_texts_are_refused(text: str, says: str) -> None:
    """By field."""
    with pytest.raises(InvalidRequest, match=says) as caught:
        images.from_text(text, "images.1")
    assert caught.value.field == "images.1"


@pytest.mark.parametrize(
    ("url", "is_one"),
    [("https://x/y", True), ("HTTP://x", True), ("ftp://x", False), ("aGk=", False)],
)
def test_addresses(url: str, is_one: bool) -> None:
    """Only http and https are fetched."""
    assert images.is_address(url) is is_one
