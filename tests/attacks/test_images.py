"""Pictures that mean harm: nothing but a refusal that names the field, and nothing decoded."""

import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from klein.errors import InvalidRequest
from klein.request import images
from tests.support import pictures

SMALL = pictures.noise(64, 64)
FILES = {
    "png": pictures.data(SMALL),
    "palette": pictures.data(SMALL.convert("P")),
    "interlaced 16 bit": pictures.data(SMALL.convert("I;16")),
    "jpeg": pictures.data(SMALL, "JPEG"),
    "progressive": pictures.data(SMALL, "JPEG", progressive=True),
    "cmyk": pictures.data(SMALL.convert("CMYK"), "JPEG"),
    "webp": pictures.data(SMALL, "WEBP"),
    "lossless webp": pictures.data(SMALL.convert("RGBA"), "WEBP", lossless=True, exif=b"Exif\0\0"),
}


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png(width: int, height: int, colour: int = 2) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    pixels = zlib.compress(bytes(1_000_000))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", pixels)


def _jpeg(width: int, height: int) -> bytes:
    data = FILES["jpeg"]
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def _webp(width: int, height: int) -> bytes:
    """An extended file of that canvas."""
    body = b"\0\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    frame = FILES["webp"][12:]
    chunks = b"VP8X" + struct.pack("<I", len(body)) + body + frame
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks


def _vp8l(width: int, height: int) -> bytes:
    bits = (width - 1) | (height - 1) << 14
    chunk = b"VP8L" + struct.pack("<IB", 25, 0x2F) + struct.pack("<I", bits) + bytes(20)
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


def _vp8(width: int, height: int) -> bytes:
    data = FILES["webp"]
    assert data[12:16] == b"VP8 "
    return data[:26] + struct.pack("<HH", width, height) + data[30:]


MAKERS: list[Callable[[int, int], bytes]] = [_png, _jpeg, _webp, _vp8l, _vp8]


def _refused(data: bytes) -> str:
    with pytest.raises(InvalidRequest) as caught:
        images.decode(data, "images.1")
    assert caught.value.field == "images.1"
    assert str(caught.value).startswith("images.1: ")
    return str(caught.value)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    ("size", "says"),
    [
        ((10_000, 10_000), "at most 25 million pixels"),
        ((16_000, 16_000), "at most 25 million pixels"),
        ((5001, 5000), "at most 25 million pixels"),
        ((4096, 511), "at most 8:1"),
        ((100, 60), "at least 64"),
    ],
)
def test_sizes_are_refused_before_anything_is_decoded(
    make: Callable[[int, int], bytes], size: tuple[int, int], says: str
) -> None:
    """From the header: with a fraction of the memory that the pixels would take."""
    data = make(*size)
    tracemalloc.start()
    assert says in _refused(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000


def test_no_decoder_runs_for_a_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither Pillow's load nor, for WebP, so much as an open."""
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    _refused(_png(9000, 9000))
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened"))
    for make in (_webp, _vp8l, _vp8):
        _refused(make(9000, 9000))


def test_too_many_bytes() -> None:
    """Whatever they are."""
    assert "20000000 are the most" in _refused(bytes(images.MAX_BYTES + 1))


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_is_refused(name: str) -> None:
    """Half a picture is none."""
    data = FILES[name]
    for end in (0, 1, 11, 13, 29, len(data) // 2, len(data) * 9 // 10):
        _refused(data[:end])


@pytest.mark.parametrize("fmt", ["PNG", "WEBP"])
def test_animations_are_refused(fmt: str) -> None:
    """Which frame was meant cannot be known."""
    frames = [pictures.noise(64, 64, seed) for seed in range(3)]
    assert "animated" in _refused(
        pictures.data(frames[0], fmt, save_all=True, append_images=frames[1:])
    )


def test_phones_write_two_pictures_into_a_jpeg() -> None:
    """Which is no animation: the first is the picture."""
    frames = [pictures.noise(64, 80, seed) for seed in range(2)]
    data = pictures.data(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert images.decode(data, "x").image.size == (64, 80)


@pytest.mark.parametrize(
    "fmt", ["GIF", "BMP", "TIFF", "ICO", "PPM", "TGA", "JPEG2000", "PDF", "EPS"]
)
def test_other_formats_are_refused(fmt: str) -> None:
    """Their decoders never see a caller's bytes."""
    assert "send a whole PNG, JPEG, WebP file" in _refused(pictures.data(SMALL, fmt))


def test_a_jpeg_of_many_scans() -> None:
    """Each would be a pass over all pixels."""
    data = FILES["progressive"]
    scan = data[data.rindex(b"\xff\xda") : -2]
    assert "more than 100 scans" in _refused(data[:-2] + scan * 200 + b"\xff\xd9")


HEAD = FILES["jpeg"][:2]
SHREDDED = {
    "empty chunks": FILES["png"][:33] + _chunk(b"abCd", b"") * 30_000 + FILES["png"][33:],
    "empty image data": FILES["png"][:-12] + _chunk(b"IDAT", b"") * 30_000 + FILES["png"][-12:],
    "empty segments": HEAD + b"\xff\xee\0\2" * 30_000 + FILES["jpeg"][2:],
    "fill bytes": HEAD + b"\xff" * 30_000 + FILES["jpeg"][2:],
    "stray bytes": HEAD + b"\0" * 30_000 + FILES["jpeg"][2:],
    "lone markers": HEAD + b"\xff\x01" * 30_000 + FILES["jpeg"][2:],
}


@pytest.mark.parametrize("name", SHREDDED)
def test_files_in_shreds_are_refused(name: str) -> None:
    """20 MB of empty parts take 7 s in which nothing else of the process runs, and 700 MB."""
    assert "more than 20000 parts" in _refused(SHREDDED[name])


def test_files_in_few_parts_are_read() -> None:
    """As cameras and editors write them: padded, with notes, and in chunks of 1 KB."""
    note = b"\xff\xfe" + struct.pack(">H", 6) + b"note"
    data = HEAD + note * 200 + b"\xff" * 100 + FILES["jpeg"][2:]
    assert images.decode(data, "x").image.size == (64, 64)
    big = pictures.data(pictures.noise(1200, 900), compress_level=0)
    start = big.index(b"IDAT") - 4
    stream, place = b"", start
    while big[place + 4 : place + 8] == b"IDAT":
        size = int.from_bytes(big[place : place + 4], "big")
        stream += big[place + 8 : place + 8 + size]
        place += 12 + size
    split = (_chunk(b"IDAT", stream[i : i + 1024]) for i in range(0, len(stream), 1024))
    assert images.decode(big[:start] + b"".join(split) + big[place:], "x").image.width == 1200


def test_a_large_text_in_a_png() -> None:
    """A compressed comment of 300 MB is not unfolded."""
    comment = _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(300_000_000)))
    data = FILES["png"]
    tracemalloc.start()
    _refused(data[:33] + comment + data[33:])
    assert tracemalloc.get_traced_memory()[1] < 80_000_000
    tracemalloc.stop()


def test_pillows_own_guards_stay() -> None:
    """The bound on pixels, and no leniency with broken files."""
    assert Image.MAX_IMAGE_PIXELS is not None
    assert images.MAX_PIXELS < Image.MAX_IMAGE_PIXELS
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def _decoded(data: bytes, field: str) -> images.Picture | None:
    """The picture, or None for a refusal, which must name its field."""
    try:
        return images.decode(data, field)
    except InvalidRequest as error:
        named = error.field
    assert named == field
    return None


@given(
    name=st.sampled_from(sorted(FILES)),
    cut=st.integers(0, 3),
    edits=st.lists(st.tuples(st.integers(0, 1 << 14), st.integers(0, 255)), max_size=8),
    inserted=st.binary(max_size=12),
)
def test_mutated_files_are_pictures_or_refused(
    name: str, cut: int, edits: list[tuple[int, int]], inserted: bytes
) -> None:
    """Nothing else leaves the reader, and no picture is above its bounds."""
    data = bytearray(FILES[name])
    for place, value in edits:
        # half of the edits go to the header, where decoders decide
        data[place % (len(data) if place % 2 else 80)] = value
    if inserted:
        data[len(inserted) * 5 : len(inserted) * 5] = inserted
    broken = bytes(data[: len(data) - cut])
    picture = _decoded(broken, "mask")
    if picture is None:
        return
    assert picture.rgb.mode == "RGB"
    assert picture.mask.mode == "L"
    assert picture.image.width * picture.image.height <= images.MAX_PIXELS


@given(st.text(max_size=80) | st.binary(max_size=60).map(lambda raw: raw.decode("latin-1")))
def test_any_text_is_bytes_or_refused(text: str) -> None:
    """As a source of a picture."""
    try:
        data = images.from_text(text, "init_image")
    except InvalidRequest:
        return
    assert _decoded(data, "init_image") is None


def test_files_are_what_they_are_called() -> None:
    """The fuzzer starts from pictures that are taken."""
    for data in FILES.values():
        assert images.decode(data, "x").image.size == (64, 64)
        assert Image.open(io.BytesIO(data)).format in ("PNG", "JPEG", "WEBP")
