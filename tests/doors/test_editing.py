"""One edit through every entrypoint, and the command line's own ways with pictures."""

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from klein.app import build
from klein.entrypoints.cli.main import main
from klein.entrypoints.http.app import standalone
from klein.entrypoints.runpod import Worker
from klein.output.images import read_text
from klein.request import images
from tests.support import fakes, pictures

ONE, TWO = pictures.noise(300, 200, 1), pictures.noise(100, 160, 2)
SPOT = pictures.spot(300, 200, (100, 60, 140, 120))
FILES = {id(ONE): "one.png", id(TWO): "two.png", id(SPOT): "spot.png"}
EDITS: dict[str, dict[str, Any]] = {
    "two references": {"images": [ONE, TWO], "reference_megapixels": 0.5},
    "a variation": {"init_image": ONE, "strength": 0.5},
    "repainting": {"init_image": ONE, "mask": SPOT, "mask_feather": 4, "mask_padding": 16},
    "extending": {"init_image": ONE, "extend": {"left": 40, "top": 8}, "images": [TWO]},
}
COMMON = {"prompt": "make the hat green", "seed": 5, "preset": "edit"}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    generator = fakes.generator(fakes.FakePipeline())
    with TestClient(standalone(generator)) as client:
        yield client
    generator.stop()


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The command line on the fake pipeline, in a folder with the pictures."""
    monkeypatch.setattr(build, "loader", lambda *_: fakes.FakePipeline)
    monkeypatch.setattr(build, "library", lambda *_: fakes.FakeLibrary())
    monkeypatch.chdir(tmp_path)
    for image in (ONE, TWO, SPOT):
        image.save(FILES[id(image)])
    return tmp_path


def _run(*argv: Any) -> int:
    return main(["generate", *map(str, argv)])


def _sent(value: Any) -> Any:
    if isinstance(value, list):
        return [_sent(each) for each in value]
    return pictures.text(value) if isinstance(value, Image.Image) else value


def _as_json(edit: dict[str, Any]) -> dict[str, Any]:
    return COMMON | {name: _sent(value) for name, value in edit.items()}


def _flags(edit: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in edit.items():
        for each in value if isinstance(value, list) else [value]:
            flag = "--image" if name == "images" else "--" + name.replace("_", "-")
            flags += [flag, FILES.get(id(each)) or json.dumps(each)]
    return flags


def _draw(edit: dict[str, Any], out: str = "out.png") -> bytes:
    """The file that the command line writes."""
    common = ("make the hat green", "--seed", 5, "--preset", "edit")
    assert _run(*common, "-o", out, *_flags(edit)) == 0
    return Path(out).read_bytes()


def _on_runpod(data: dict[str, Any]) -> dict[str, Any]:
    async def send(job: dict[str, Any], update: dict[str, Any]) -> None:
        return

    generator = fakes.generator(fakes.FakePipeline())
    try:
        answer = asyncio.run(Worker(generator, send).handle({"id": "1", "input": data}))
        return dict(json.loads(json.dumps(answer)))
    finally:
        generator.stop()


@pytest.mark.parametrize("name", EDITS)
def test_entrypoints_agree_byte_for_byte(client: TestClient, cli: Path, name: str) -> None:
    """HTTP, RunPod and the command line take the same fields and give the same file."""
    data = _as_json(EDITS[name])
    over_http = client.post("/generate_json", json=data).json()
    on_runpod = _on_runpod(data)
    written = _draw(EDITS[name])
    assert base64.b64decode(over_http["images"][0]["base64"]) == written
    assert base64.b64decode(on_runpod["images"][0]["base64"]) == written
    assert client.post("/generate", json=data).content == written
    assert on_runpod["parameters"] == over_http["parameters"]


def test_the_answer_says_what_each_picture_was_used_at(client: TestClient) -> None:
    """Size and tokens of each reference; a repainted picture has its own size, and what stayed."""
    answer = client.post("/generate_json", json=_as_json(EDITS["two references"])).json()
    one, two = answer["parameters"]["images"]
    assert {name: one[name] for name in one if name != "sha256"} == {
        "width": 300,
        "height": 200,
        "used_width": 208,
        "used_height": 144,
        "tokens": 13 * 9,
    }
    assert (two["width"], two["tokens"]) == (100, 6 * 10)
    assert "unchanged_pixels" not in answer["images"][0]
    answer = client.post("/generate_json", json=_as_json(EDITS["repainting"])).json()
    (image,) = answer["images"]
    assert (image["width"], image["height"]) == (300, 200)
    assert image["unchanged_pixels"] == 300 * 200 - 40 * 60


@pytest.mark.parametrize(
    ("delivery", "counts"),
    [
        ({}, True),
        ({"output_format": "webp", "output_quality": 100}, True),
        ({"output_format": "webp"}, False),
        ({"output_format": "jpeg", "output_quality": 100}, False),
    ],
)
def test_the_count_holds_for_the_file(
    client: TestClient, delivery: dict[str, Any], counts: bool
) -> None:
    """Counted in the bytes that arrive; a format that changes pixels claims nothing and says so."""
    answer = client.post("/generate_json", json=_as_json(EDITS["repainting"]) | delivery).json()
    (entry,) = answer["images"]
    assert any("outside the mask" in warning for warning in answer["warnings"]) is not counts
    assert ("unchanged_pixels" in entry) is counts
    if counts:
        arrived = Image.open(io.BytesIO(base64.b64decode(entry["base64"]))).convert("RGB")
        same = (np.asarray(arrived) == np.asarray(ONE)).all(axis=2)
        assert np.count_nonzero(same[np.asarray(SPOT) == 0]) == entry["unchanged_pixels"]


def test_a_bad_picture_over_http_and_on_runpod(client: TestClient) -> None:
    """A status of the caller's, the field and the index."""
    data = COMMON | {"images": [pictures.text(ONE), "aGk="]}
    answer = client.post("/generate_json", json=data)
    assert answer.status_code == 400
    assert answer.json()["error"]["field"] == "images.1"
    assert _on_runpod(data)["error"].startswith("invalid_request: images.1: ")


def test_an_edit_leaves_no_trace(client: TestClient) -> None:
    """A failed or finished edit changes nothing of the next picture."""
    text = {"prompt": "x", "seed": 3}
    before = client.post("/generate", json=text).content
    assert client.post("/generate", json=COMMON | {"images": ["aGk="]}).status_code == 400
    assert client.post("/generate", json=_as_json(EDITS["repainting"])).status_code == 200
    assert client.post("/generate", json=text).content == before


@pytest.mark.parametrize("name", EDITS)
def test_like_draws_an_edit_again(cli: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """From the file and its pictures alone, without a word."""
    written = _draw(EDITS[name])
    pictures_only = ("images", "init_image", "mask")
    sent = {field: value for field, value in EDITS[name].items() if field in pictures_only}
    capsys.readouterr()
    assert _run("--like", "out.png", "-o", "again.png", *_flags(sent)) == 0
    assert Path("again.png").read_bytes() == written
    assert "note" not in capsys.readouterr().err


def test_like_names_what_is_missing(cli: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With size and hash, and how to give it."""
    _draw(EDITS["repainting"])
    assert _run("--like", "out.png", "-o", "again.png", "--init-image", "one.png") == 2
    assert "--mask: 300×200, sha256 " in capsys.readouterr().err
    _draw(EDITS["two references"])
    assert _run("--like", "out.png", "-o", "again.png", "--image", "one.png") == 2
    shown = capsys.readouterr().err
    assert "--image (image 2): 100×160, sha256 " in shown
    assert "image 1" not in shown


def test_like_warns_of_another_picture(cli: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And draws with it all the same."""
    _draw(EDITS["two references"])
    swapped = ("--image", "two.png", "--image", "two.png")
    assert _run("--like", "out.png", "-o", "again.png", *swapped) == 0
    shown = capsys.readouterr().err
    assert "note: images.0 is not the picture out.png was made of" in shown
    assert "images.1" not in shown


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--image", "none.png"], "none.png cannot be read"),
        (["--image", "large.png"], "more than 20000000 bytes"),
        (["--images", "one.png"], "--image PATH is simpler"),
        (["--extend", "left"], """write '{"left": 256}'"""),
        (["--strength", "0.5"], "send the picture to start from as init_image"),
        (["--init-image", "text.txt"], "init_image: not a picture"),
    ],
)
def test_the_callers_faults(
    cli: Path, flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line and 2."""
    Path("large.png").write_bytes(bytes(images.MAX_BYTES + 1))
    Path("text.txt").write_text("hello")
    assert _run("x", "-o", "out.png", *flags) == 2
    assert says in capsys.readouterr().err


def test_the_file_names_pictures_by_hash_and_size_only(cli: Path) -> None:
    """Neither a path nor a pixel of theirs leaves with it."""
    text = read_text(_draw(EDITS["repainting"]))
    assert "one.png" not in text
    assert len(text) < 3000
