"""Pictures that callers send: from text to bytes to pixels, bounded before anything is decoded.

They come from anybody. Only the three decoders named here ever see the bytes, and they do so
after the header has said how many pixels there are.
"""

import base64
import binascii
import hashlib
import io
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from klein.errors import InvalidRequest
from klein.models import sizes
from klein.settings import PICTURES_MB

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_IMAGES = 4
MAX_BYTES = 20_000_000
MAX_TOTAL_BYTES = PICTURES_MB * 1_000_000
"""Of all pictures of a request together."""
MAX_TEXT = MAX_BYTES * 4 // 3 + 100
"""Characters of base64 for the largest picture, with a data URI's head."""
MAX_PIXELS = 25_000_000
_MOST_PIXELS = f"at most {MAX_PIXELS // 10**6} million pixels are read"
MAX_JPEG_SCANS = 100
"""A progressive JPEG has about ten; each is a pass over all pixels."""
MAX_PARTS = 20_000
"""Chunks of a PNG, or segments and stray bytes before the scans of a JPEG: Pillow looks at each in
Python, with the interpreter's lock held. The largest PNG in chunks of 1 KB has as many."""

_DECODERS = {"PNG": "PNG", "JPEG": "JPEG", "MPO": "JPEG", "WEBP": "WebP"}
"""Pillow's formats and their names. Phones write MPO: a JPEG with a second picture behind it."""
_LONE_MARKERS = frozenset(bytes([code]) for code in (0x01, *range(0xD0, 0xDA)))
"""Of JPEG: those without a length and a content."""
_DATA = re.compile(r"data:([^;,]*);base64,", re.IGNORECASE)
_MEDIA_TYPES = ("image/png", "image/jpeg", "image/jpg", "image/webp")


@dataclass(frozen=True, slots=True)
class Picture:
    """A caller's picture: upright, RGB, or RGBA where parts of it are transparent.

    `sha256` is that of its bytes, `data`; `notes` say what was changed by reading it.
    """

    image: "Image"
    data: bytes
    sha256: str
    notes: tuple[str, ...] = ()

    @property
    def rgb(self) -> "Image":
        """The picture on white; pixels that are opaque stay as they are."""
        from PIL import Image

        if self.image.mode == "RGB":
            return self.image
        white = Image.new("RGB", self.image.size, "white")
        white.paste(self.image, mask=self.image.getchannel("A"))
        return white

    @property
    def mask(self) -> "Image":
        """The picture as a mask of 0 and 255: what is at least half transparent is repainted, or
        where nothing is transparent, what is at least half white."""
        from PIL import ImageChops

        if self.image.mode == "RGBA":
            grey = ImageChops.invert(self.image.getchannel("A"))
        else:
            grey = self.image.convert("L")
        return grey.point(lambda value: 255 if value >= 128 else 0)


def is_address(source: str) -> bool:
    """Whether a picture is to be fetched."""
    return source[:8].lower().startswith(("https://", "http://"))


def from_text(source: str, field: str) -> bytes:
    """The bytes in a data URI or in base64; raises InvalidRequest."""
    head = _DATA.match(source[:200])
    if head is None and source[:5].lower() == "data:":
        raise InvalidRequest(f"{field}: a data URI begins with data:image/png;base64,", field=field)
    if head and head[1].lower() not in _MEDIA_TYPES:
        known = ", ".join(_MEDIA_TYPES)
        raise InvalidRequest(
            f"{field}: the data URI's type is {head[1][:80]!r}; known are {known}", field=field
        )
    try:
        return base64.b64decode(source[head.end() if head else 0 :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(
            f"{field}: neither an https address nor a data URI nor base64 (without line breaks)",
            field=field,
        ) from error


def decode(data: bytes, field: str) -> Picture:
    """The picture in `data`; raises InvalidRequest that names `field`.

    A decoder may raise anything at all for bytes that somebody made up, so everything it raises is
    the bytes' fault.
    """
    from PIL import Image

    if len(data) > MAX_BYTES:
        raise _refused(field, f"{len(data)} bytes are too many; {MAX_BYTES} are the most")
    try:
        _check_unopened(data, field)
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            _check_size(*image.size, field)
            if image.format in ("PNG", "WEBP") and getattr(image, "is_animated", False):
                raise _refused(field, "it is animated; send one frame")
            image.load()
            return _upright(image, data)
    except InvalidRequest:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _refused(field, f"it is too large; {_MOST_PIXELS}") from error
    except Exception as error:
        known = ", ".join(dict.fromkeys(_DECODERS.values()))
        raise _refused(
            field, f"not a picture that can be read; send a whole {known} file"
        ) from error


def _refused(field: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"{field}: {why}", field=field)


def _check_unopened(data: bytes, field: str) -> None:
    """Refuse what would cost something to open, or to decode whatever its size."""
    if (size := _webp_size(data)) is not None:
        _check_size(*size, field)
    if data[:2] == b"\xff\xd8" and data.count(b"\xff\xda") > MAX_JPEG_SCANS:
        raise _refused(field, f"a JPEG of more than {MAX_JPEG_SCANS} scans; save it again")
    if len(list(islice(_parts(data), MAX_PARTS + 1))) > MAX_PARTS:
        raise _refused(field, f"a file of more than {MAX_PARTS} parts; save it again")


def _parts(data: bytes) -> Iterator[int]:
    """Where the parts of a PNG or JPEG that Pillow looks at one by one begin, as far as it does."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        place = 8
        while place < len(data):
            yield place
            place += 12 + int.from_bytes(data[place : place + 4], "big")
    elif data[:2] == b"\xff\xd8":
        place = 2
        while place < len(data) and data[place : place + 2] != b"\xff\xda":
            yield place
            is_marker = data[place] == 0xFF and data[place + 1 : place + 2] not in (b"\0", b"\xff")
            place += _segment_size(data, place) if is_marker else 1


def _segment_size(data: bytes, place: int) -> int:
    if data[place + 1 : place + 2] in _LONE_MARKERS:
        return 2
    return 2 + int.from_bytes(data[place + 2 : place + 4], "big")


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """The canvas of a WebP in pixels, since Pillow gets memory for it as soon as it is opened."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return None
    match data[12:16]:
        case b"VP8X":
            width, height = (int.from_bytes(data[i : i + 3], "little") + 1 for i in (24, 27))
        case b"VP8L":
            (bits,) = struct.unpack_from("<I", data, 21)
            width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case _:
            width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    return width, height


def _check_size(width: int, height: int, field: str) -> None:
    shown = f"{width}×{height}"
    if min(width, height) < sizes.SMALLEST:
        raise _refused(field, f"{shown} is too small: both sides are at least {sizes.SMALLEST}")
    if max(width, height) > sizes.MAX_ASPECT * min(width, height):
        raise _refused(field, f"{shown} is too narrow: sides are at most {sizes.MAX_ASPECT:g}:1")
    if width * height > MAX_PIXELS:
        raise _refused(field, f"{shown} is too large; {_MOST_PIXELS}")


def _upright(image: "Image", data: bytes) -> Picture:
    from PIL import ImageOps

    notes = [note for note, is_so in _NOTES.items() if is_so(image, data)]
    turned = ImageOps.exif_transpose(image)
    return Picture(_normal(turned), data, hashlib.sha256(data).hexdigest(), tuple(notes))


def _normal(image: "Image") -> "Image":
    """RGB, or RGBA where some pixel is not opaque."""
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return rgba.convert("RGB") if rgba.getchannel("A").getextrema() == (255, 255) else rgba


def _eight_bits(image: "Image") -> "Image":
    """A grey image of 16 bits, which Pillow would cut off at 255, in 8."""
    import numpy as np
    from PIL import Image

    return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))


def _is_deep(image: "Image", data: bytes) -> bool:
    return image.format == "PNG" and data[24:25] == b"\x10"


def _has_profile(image: "Image", data: bytes) -> bool:
    profile = image.info.get("icc_profile") or b""
    return bool(profile) and not any("sRGB".encode(c) in profile for c in ("ascii", "utf-16-be"))


_NOTES = {
    "its 16 bits a channel were read as 8": _is_deep,
    "its CMYK colours were turned into RGB without a profile": lambda image, _: (
        image.mode == "CMYK"
    ),
    "its colour profile was left out: its values were taken as sRGB": _has_profile,
}
