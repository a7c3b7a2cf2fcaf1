import time
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from klein.app.prepare import prepare
from klein.core import InputInfo, Job, Margins, Progress
from klein.errors import (
    Cancelled,
    DeadlineExceeded,
    ImageUnavailable,
    InvalidRequest,
    KleinError,
)
from klein.request import images
from klein.sources.fetch import Fetcher
from tests.support import fakes, pictures, servers

ONE, TWO = pictures.noise(300, 200, 1), pictures.noise(100, 160, 2)
SPOT = pictures.spot(300, 200, (100, 60, 140, 120))


def _job(fetcher: Fetcher | None = None, **values: Any) -> Job:
    """Prepared for nano, whose native size is 256."""
    return prepare(
        fakes.resolved(**values), fakes.context(), fakes.FakeLibrary(), fetcher or Fetcher()
    )


def test_references() -> None:
    """In order, each at most the model's native area, with size and tokens in the parameters; the
    first decides the shape that is drawn."""
    job = _job(images=[pictures.text(ONE), pictures.text(TWO, "WEBP", lossless=True)])
    one, two = job.inputs.references
    assert (one.image.size, two.image.size) == ((288, 192), (96, 160))
    assert two.image.tobytes() == TWO.crop((2, 0, 98, 160)).tobytes()
    assert (one.tokens, two.tokens, job.inputs.reference_tokens) == (216, 60, 276)
    assert [each.sha256 for each in job.params.images] == [one.sha256, two.sha256]
    assert job.params.images[0] == InputInfo(one.sha256, 300, 200, 288, 192, 216)
    assert (job.params.width, job.params.height) == (320, 208)
    assert (job.inputs.start, job.inputs.repaint) == (None, None)


def test_the_reference_bound() -> None:
    """In the request's own megapixels."""
    (small,) = _job(images=[pictures.text(ONE)], reference_megapixels=0.25).inputs.references
    assert small.image.size == (144, 96)
    big = pictures.noise(800, 400)
    (full,) = _job(images=[pictures.text(big)], reference_megapixels=4).inputs.references
    assert full.image.size == (720, 352)


@pytest.mark.parametrize(
    ("asked", "drawn"),
    [
        ({}, (320, 208)),
        ({"width": 480}, (480, 320)),
        ({"height": 100}, (144, 96)),
        ({"width": 256, "height": 256}, (256, 256)),
        ({"preset": "portrait_hd"}, (384, 256)),
    ],
)
def test_the_size_follows_the_first_picture(asked: dict[str, Any], drawn: tuple[int, int]) -> None:
    """As far as the request leaves it open, at the preset's number of pixels."""
    for values in ({"images": [pictures.text(ONE)]}, {"init_image": pictures.text(ONE)}):
        params = _job(**values, **asked).params
        assert (params.width, params.height) == drawn


def test_a_variation() -> None:
    """The start image has the size that is drawn and is no reference."""
    job = _job(init_image=pictures.text(ONE), images=[pictures.text(TWO)])
    assert job.inputs.start is not None
    assert job.inputs.start.image.size == (job.params.width, job.params.height) == (320, 208)
    assert [each.width for each in job.inputs.references] == [100]
    assert job.params.init_image == InputInfo(job.inputs.start.sha256, 300, 200, 320, 208, 0)
    assert job.params.strength == 0.8
    assert job.inputs.repaint is None
    assert job.warnings == ()


def test_a_variation_of_another_shape_is_cropped_and_told() -> None:
    """Not stretched."""
    job = _job(init_image=pictures.text(ONE), width=256, height=256)
    assert "init_image: 300×200 was cropped" in job.warnings[0]


def test_repainting() -> None:
    """The picture is start and first reference; what is drawn goes back through the mask."""
    job = _job(init_image=pictures.text(ONE), mask=pictures.text(SPOT), images=[pictures.text(TWO)])
    start, repaint = job.inputs.start, job.inputs.repaint
    assert start is not None
    assert repaint is not None
    first, second = job.inputs.references
    assert start.image.size == repaint.mask.size == (320, 208)
    assert (first.sha256, first.tokens) == (start.sha256, 228)
    assert first.image.size == (304, 192)
    assert (second.width, second.height) == (100, 160)
    assert repaint.original.tobytes() == ONE.tobytes()
    image, unchanged = repaint.put_back(Image.new("RGB", (320, 208), "red"))
    assert unchanged == 300 * 200 - 40 * 60
    assert image.getpixel((120, 90)) == (255, 0, 0)
    assert job.params.mask is not None
    assert job.params.mask.width == 300
    assert job.params.init_image is not None
    assert job.params.init_image.tokens == 228


def test_a_reference_that_fits_is_the_start_image_itself() -> None:
    """So that one encoding serves both, as in diffusers."""
    job = _job(init_image=pictures.text(pictures.noise(256, 256)), mask=_mask(256, 256))
    assert job.inputs.start is not None
    assert job.inputs.references[0].image is not None
    assert job.inputs.references[0].image.tobytes() == job.inputs.start.image.tobytes()


def _mask(width: int, height: int) -> str:
    return pictures.text(pictures.spot(width, height, (64, 64, 128, 128)))


def test_mask_padding_draws_the_crop() -> None:
    """At full resolution; the size that is drawn has its shape, and can be sent again."""
    values: dict[str, Any] = {
        "init_image": pictures.text(ONE),
        "mask": pictures.text(SPOT),
        "mask_padding": 20,
    }
    job = _job(**values)
    assert job.inputs.repaint is not None
    assert job.inputs.repaint.box == (80, 40, 160, 140)
    size = job.params.width, job.params.height
    assert size == (224, 288)
    again = _job(**values, width=size[0], height=size[1])
    assert again.inputs.repaint is not None
    assert again.inputs.repaint.box == job.inputs.repaint.box
    assert again.warnings == ()


def test_extending() -> None:
    """The margins are repainted, the picture stays, and the reference is the picture alone."""
    job = _job(init_image=pictures.text(ONE), extend={"left": 100, "bottom": 56})
    assert job.params.extend == Margins(left=100, bottom=56)
    assert job.inputs.repaint is not None
    image, unchanged = job.inputs.repaint.put_back(Image.new("RGB", (10, 10), "red"))
    assert image.size == (400, 256)
    assert unchanged == 300 * 200
    assert image.crop((100, 0, 400, 200)).tobytes() == ONE.tobytes()
    assert job.inputs.references[0].image.size == (288, 192)
    assert (job.params.width, job.params.height) == (320, 208)
    assert job.params.mask is None


@pytest.mark.parametrize(
    ("values", "field", "says"),
    [
        ({"images": [pictures.text(ONE), "aGk="]}, "images.1", "not a picture"),
        ({"images": ["?"]}, "images.0", "neither"),
        ({"init_image": "aGk="}, "init_image", "not a picture"),
        ({"mask": "aGk="}, "mask", "not a picture"),
        ({"mask": _mask(200, 300)}, "mask", "200×300, but init_image is 300×200"),
        ({"mask": pictures.text(Image.new("L", (300, 200)))}, "mask", "nothing to repaint"),
        ({"extend": {"left": 4000}}, "extend", "at most 8:1"),
        ({"height": 2048}, "height", "at most 4"),
    ],
)
def test_each_failure_names_its_field(values: dict[str, Any], field: str, says: str) -> None:
    """And its index."""
    if "images" not in values:
        values = {"init_image": pictures.text(ONE), **values}
    with pytest.raises(InvalidRequest, match=says) as caught:
        _job(**values)
    assert caught.value.field == field


def test_pictures_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each may be large, all of them not."""
    text = pictures.text(ONE)
    monkeypatch.setattr(images, "MAX_TOTAL_BYTES", 400_000)
    with pytest.raises(InvalidRequest, match="more than 400000 bytes together") as caught:
        _job(images=[text] * 3)
    assert caught.value.field == "images.2"


def test_pictures_are_read_before_loras_are_fetched() -> None:
    """A bad picture costs no download."""
    library = fakes.FakeLibrary()
    resolved = fakes.resolved(images=["?"], loras=[{"path": "a/b"}])
    with pytest.raises(InvalidRequest):
        prepare(resolved, fakes.context(), library, Fetcher())
    assert library.asked == []


def test_what_reading_changed_is_told() -> None:
    """By field."""
    sent = pictures.text(ONE.convert("CMYK"), "JPEG")
    assert _job(images=[sent]).warnings[0].startswith("images.0: its CMYK colours")


@pytest.fixture
def server() -> Iterator[servers.Server]:
    data = pictures.data(ONE)
    routes: dict[str, servers.Answer] = {
        "/a.png": (200, {}, data),
        "/busy": (503, {}, b""),
        "/gone": (404, {}, b""),
    }
    routes["/large"] = (200, {}, bytes(images.MAX_BYTES + 1))
    with servers.serve(lambda request: routes[request.path]) as server:
        yield server


def _own(server: servers.Server) -> Fetcher:
    return Fetcher(frozenset({server.url.removeprefix("http://")}))


def test_addresses_are_fetched(server: servers.Server) -> None:
    """And told as progress of the stage "fetch"."""
    heard: list[Progress] = []
    resolved = fakes.resolved(images=[f"{server.url}/a.png"])
    context = fakes.context(on_progress=heard.append)
    job = prepare(resolved, context, fakes.FakeLibrary(), _own(server))
    assert job.inputs.references[0].image.tobytes() == ONE.crop((6, 4, 294, 196)).tobytes()
    assert heard[-1].stage == "fetch"
    assert heard[-1].fraction == 1


@pytest.mark.parametrize(
    ("path", "kind", "says"),
    [
        ("/gone", InvalidRequest, "status 404"),
        ("/busy", ImageUnavailable, "status 503"),
        ("/large", InvalidRequest, "more than 20000000 bytes"),
    ],
)
def test_what_cannot_be_fetched(
    server: servers.Server, path: str, kind: type[KleinError], says: str
) -> None:
    """The caller's fault, or worth another try; by field and index either way."""
    with pytest.raises(kind, match=says) as caught:
        _job(_own(server), images=[pictures.text(ONE), f"{server.url}{path}"])
    assert caught.value.field == "images.1"
    assert caught.value.retryable is (kind is ImageUnavailable)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/a.png", "https://127.0.0.1:9/a.png"])
def test_the_operators_network_is_not_reached(url: str) -> None:
    """Pictures go through the same guard as LoRAs."""
    with pytest.raises(InvalidRequest, match=r"https|inside this network") as caught:
        _job(images=[url])
    assert caught.value.field == "images.0"


def test_a_job_that_is_over_reads_nothing_more(server: servers.Server) -> None:
    """Cancelled or out of time."""
    resolved, library = fakes.resolved(images=[f"{server.url}/a.png"]), fakes.FakeLibrary()
    cancelled, late = fakes.context(), fakes.context(seconds=0)
    cancelled.cancel()
    for context, kind in ((cancelled, Cancelled), (late, DeadlineExceeded)):
        started = time.monotonic()
        with pytest.raises(kind):
            prepare(resolved, context, library, _own(server))
        assert time.monotonic() - started < 1
