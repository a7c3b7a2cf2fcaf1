import base64
import io
import json
import shutil
import subprocess
import urllib.request
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from klein.core import GenerationParams, InputInfo
from klein.errors import InvalidRequest
from klein.output import images, metadata, response
from klein.output.delivery import Bucket
from klein.output.marks import DRAWN, EDITED, Marks
from klein.request.formats import FORMATS
from klein.settings import Secret, Settings
from tests.support import fakes, marks, pictures, servers

LOOK = pictures.noise(96, 64)
PICTURE = InputInfo("ab" * 32, 8, 8, 16, 16, 1)


def _file(name: str, made: Marks, **params: Any) -> bytes:
    result = fakes.result(fakes.params(prompt="my secret", negative_prompt="hush", **params))
    (encoded,) = response.encode(result, fakes.delivery(output_format=name), made)
    return encoded.data


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_says_that_ai_made_it(name: str) -> None:
    """In IPTC's words, beside the parameters, which are read as before."""
    data = _file(name, Marks())
    assert marks.source_type(data) == DRAWN
    with Image.open(io.BytesIO(data)) as image:
        assert DRAWN in str(image.info["xmp"])
    assert metadata.from_text(images.read_text(data)).prompt == "my secret"


@pytest.mark.parametrize(
    "values",
    [{"images": (PICTURE,)}, {"init_image": PICTURE}, {"init_image": PICTURE, "mask": PICTURE}],
)
def test_what_is_made_of_pictures_says_so(values: dict[str, Any]) -> None:
    """By what was asked: IPTC has another word for it."""
    params: GenerationParams = replace(fakes.params(), **values)
    assert EDITED.encode() in Marks().xmp(params)
    assert Marks().of(params)["digital_source_type"] == EDITED
    assert Marks().of(fakes.params())["digital_source_type"] == DRAWN


@pytest.mark.parametrize("name", FORMATS)
def test_the_mark_is_one_chunk_and_nothing_else(name: str) -> None:
    """Without it a file is what Pillow alone writes; with it every other chunk is the same."""
    fmt = FORMATS[name]
    plain = images.encode(LOOK, fmt, 90, "text")
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + "text".encode("utf-16-be")
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "text")
    options: dict[str, dict[str, Any]] = {
        "png": {"pnginfo": info, "compress_level": 1, "compress_type": zlib.Z_RLE},
        "jpeg": {"quality": 90, "subsampling": 0, "exif": exif},
        "webp": {"quality": 90, "lossless": False, "exif": exif},
    }
    assert plain == pictures.data(LOOK, name.upper(), **options[name])
    marked = images.encode(LOOK, fmt, 90, "text", Marks().xmp(fakes.params()))
    left = [chunk for chunk in marks.chunks(marked) if not marks.is_xmp(chunk)]
    assert _without_flags(left) == _without_flags(marks.chunks(plain))


def _without_flags(chunks: list[marks.Chunk]) -> list[marks.Chunk]:
    """WebP's first chunk says whether there is XMP."""
    return [(name, data[1:] if name == b"VP8X" else data) for name, data in chunks]


@pytest.mark.parametrize("name", FORMATS)
def test_the_mark_can_be_turned_off(name: str) -> None:
    """And then it is not told either."""
    off = Marks.from_settings(Settings.from_env({"KLEIN_AI_MARK": "off"}))
    assert marks.source_type(_file(name, off)) is None
    assert off.of(fakes.params())["digital_source_type"] is None


@pytest.mark.parametrize("name", FORMATS)
def test_metadata_can_be_left_out(name: str) -> None:
    """Nothing of the caller's is in the file, and reading it says what would be needed."""
    loras = [{"path": "anna.safetensors"}]
    minimal = _file(name, Marks(metadata="minimal"), loras=loras, seed=5)
    assert "Seed: 5" in images.read_text(minimal)
    with pytest.raises(InvalidRequest, match="KLEIN_METADATA=full"):
        metadata.from_text(images.read_text(minimal))
    nothing = _file(name, Marks(metadata="none"), loras=loras)
    with pytest.raises(InvalidRequest, match="KLEIN_METADATA=none"):
        images.read_text(nothing)
    for data in (minimal, nothing):
        for word in ("my secret", "hush", "anna"):
            assert word.encode() not in data
            assert word.encode("utf-16-be") not in data
        assert marks.source_type(data) == DRAWN
    kept = {name for name, _ in marks.chunks(nothing)}
    assert not kept & {b"tEXt", b"EXIF"}


def test_the_answer_says_which_marks_are_in_force() -> None:
    """Beside the images."""
    made = Marks(metadata="minimal")
    told = response.to_json(fakes.result(fakes.params()), fakes.delivery(), made)["marks"]
    assert told == {
        "ai": True,
        "c2pa": False,
        "metadata": "minimal",
        "digital_source_type": DRAWN,
    }


@pytest.mark.parametrize("name", FORMATS)
def test_marks_survive_the_bucket(name: str) -> None:
    """What a link leads to is the file as it was marked."""
    result, delivery = fakes.result(fakes.params()), fakes.delivery(output_format=name)
    with servers.serve(servers.bucket()) as server:
        bucket = Bucket(server.url, "b", Secret("i"), Secret("s"), 60)
        answer = response.to_json(result, replace(delivery, return_type="url"), Marks(), bucket)
        data = urllib.request.urlopen(answer["images"][0]["url"]).read()
    assert data == response.encode(result, delivery, Marks())[0].data
    assert marks.source_type(data) == DRAWN


def test_smaller_files_for_a_platform_are_marked_too() -> None:
    """What is written again as WebP has the mark and no prompt."""
    result = fakes.result(fakes.params(prompt="my secret", width=512, height=512), noise=True)
    made = Marks(metadata="none")
    answer = response.to_json_within(result, fakes.delivery(), made, None, 0.9e6)
    data = base64.b64decode(answer["images"][0]["base64"])
    assert marks.source_type(data) == DRAWN
    assert marks.chunks(data)[0][0] == b"VP8X"
    assert "my secret".encode("utf-16-be") not in data


@pytest.mark.skipif(
    shutil.which("exiftool") is None,
    reason="exiftool is not there: apt-get install libimage-exiftool-perl",
)
@pytest.mark.parametrize("name", FORMATS)
def test_exiftool_reads_the_mark(name: str, tmp_path: Path) -> None:
    """As people and platforms do who look for it."""
    path = tmp_path / f"a.{FORMATS[name].extension}"
    path.write_bytes(_file(name, Marks()))
    shown = subprocess.run(
        ["exiftool", "-json", "-n", "-DigitalSourceType", path],
        capture_output=True,
        check=True,
    )
    (told,) = json.loads(shown.stdout)
    assert told["DigitalSourceType"] == marks.PREFIX + DRAWN
