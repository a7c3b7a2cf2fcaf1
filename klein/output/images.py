"""Writes pictures as bytes with a text and an XMP packet inside, and reads the text back.

PNG carries the text in the `parameters` text chunk, JPEG and WebP in the EXIF user comment: the
places where A1111, Civitai and their kin look.
"""

import base64
import io
import zlib
from typing import TYPE_CHECKING

from klein.errors import InvalidRequest, OutputTooLarge
from klein.request.formats import OutputFormat

if TYPE_CHECKING:
    from PIL.Image import Image

_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
_UNICODE = b"UNICODE\x00"
_MAX_EXIF = 65_533
"""Bytes of one marker of a JPEG."""
PREVIEW_EVERY = 4
"""Steps from one preview to the next."""
PREVIEW_SIDE = 256
"""Pixels of a preview's longer side, at most."""


def encode(image: "Image", fmt: OutputFormat, quality: int, text: str, xmp: bytes = b"") -> bytes:
    """The file's bytes. `quality` 1 to 100 acts on jpeg and webp; webp at 100 is lossless. An empty
    text or packet takes no place. Raises OutputTooLarge for a text that a JPEG cannot hold."""
    from PIL import PngImagePlugin

    out = io.BytesIO()
    image = _bare(image)
    if fmt.name == "png":
        info = PngImagePlugin.PngInfo()
        if text:
            info.add_text("parameters", text)
        if xmp:
            info.add_itxt("XML:com.adobe.xmp", xmp.decode())
        image.save(out, "PNG", pnginfo=info, compress_level=1, compress_type=zlib.Z_RLE)
    elif fmt.name == "jpeg":
        exif = _exif(text)
        if len(exif) > _MAX_EXIF:
            raise OutputTooLarge(
                "output_format: the prompts and LoRAs of this image are too long to be inside a "
                "jpeg; ask for png or webp",
                field="output_format",
            )
        image.save(out, "JPEG", quality=quality, subsampling=0, exif=exif, xmp=xmp)
    else:
        lossless = fmt.is_exact(quality)
        image.save(out, "WEBP", quality=quality, lossless=lossless, exif=_exif(text), xmp=xmp)
    return out.getvalue()


def preview_uri(image: "Image", xmp: bytes) -> str:
    """An image as a small JPEG in a data URI."""
    small = _bare(image).copy()
    small.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=80, xmp=xmp)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def read_text(data: bytes) -> str:
    """The text inside a picture; raises InvalidRequest for a file without one."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            text = image.info.get("parameters")
            comment = image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT, b"")
        if text is None and isinstance(comment, bytes) and comment.startswith(_UNICODE):
            text = comment.removeprefix(_UNICODE).decode("utf-16-be")
    except Exception as error:  # a decoder may raise anything for a damaged file
        raise InvalidRequest("this file is not a picture that can be read") from error
    if isinstance(text, str):
        return text
    raise InvalidRequest(
        "this picture has no generation parameters inside; klein writes none with "
        "KLEIN_METADATA=none"
    )


def _bare(image: "Image") -> "Image":
    """The image without what Pillow would write of the file that it was read from: a caller's
    picture has a colour profile, a comment and more, also when it was repainted."""
    if image.info:
        image = image.copy()
        image.info = {}
    return image


def _exif(text: str) -> bytes:
    from PIL import Image

    if not text:
        return b""
    exif = Image.Exif()
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _UNICODE + text.encode("utf-16-be")
    return exif.tobytes()
