import asyncio
import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from klein.app.filter import NO_PREVIEWS, Filter
from klein.app.generator import Generated, Generator
from klein.core import Job, Preview, PreviewRequest
from klein.errors import (
    BadSetting,
    DeadlineExceeded,
    FilterFailed,
    QueueFull,
    RefusedByFilter,
)
from klein.output import response
from klein.settings import Settings
from tests.support import fakes, filters, pictures

FILTER = {"KLEIN_FILTER": "tests.support.filters:judge"}
SHORT = 1.0
"""Seconds for filters that hang; those that do not get as long as a busy machine takes."""


@pytest.fixture
def pipeline() -> fakes.FakePipeline:
    return fakes.FakePipeline()


@pytest.fixture
def generator(pipeline: fakes.FakePipeline) -> Iterator[Generator]:
    yield from _generator(pipeline)


@pytest.fixture
def impatient(pipeline: fakes.FakePipeline) -> Iterator[Generator]:
    yield from _generator(pipeline, KLEIN_FILTER_SECONDS=str(SHORT))


def _generator(pipeline: fakes.FakePipeline, **settings: str) -> Iterator[Generator]:
    filters.seen.clear()
    filters.released.clear()
    made = fakes.generator(pipeline, **FILTER, **settings)
    yield made
    filters.released.set()
    pipeline.gate.set()
    made.stop()


def _draw(generator: Generator, prompt: str, **values: Any) -> Generated:
    request = fakes.request(prompt=prompt, num_inference_steps=4, **{"seed": 1} | values)
    return asyncio.run(generator.run(request, generator.context()))


def test_a_refused_prompt_never_takes_a_place(
    generator: Generator, pipeline: fakes.FakePipeline
) -> None:
    """The reason and the field are told, in bounds, and asking again is of no use."""
    with pytest.raises(RefusedByFilter, match="refused the request: a bad word") as caught:
        _draw(generator, "bad")
    assert (caught.value.field, caught.value.retryable) == ("prompt", False)
    assert len(str(caught.value)) < 600
    assert pipeline.drawn == []


def test_what_a_filter_says_is_made_fit_to_be_told(generator: Generator) -> None:
    """In JSON, in a log and in a terminal; its field is a short text."""
    with pytest.raises(RefusedByFilter, match=r"the request: half a \[31m pair$") as caught:
        _draw(generator, "garbled")
    assert "object" in json.loads(json.dumps(caught.value.as_dict()))["field"]
    str(caught.value).encode()


def test_it_sees_what_the_caller_sends(generator: Generator, pipeline: fakes.FakePipeline) -> None:
    """Prompts, references and the picture to start from, before anything is drawn."""
    green, red = (pictures.text(Image.new("RGB", (64, 64), name)) for name in ("lime", "red"))
    _draw(generator, "fine", images=[green, green], init_image=green, negative_prompt="fog")
    first = filters.seen[0][0]
    assert (first.stage, first.prompt, first.negative_prompt) == ("request", "fine", "fog")
    assert [image.getpixel((0, 0)) for image in first.images] == [(0, 255, 0)] * 3
    pipeline.drawn.clear()
    for values in ({"images": [green, red]}, {"init_image": red}):
        with pytest.raises(RefusedByFilter, match="its colour"):
            _draw(generator, "fine", **values)
    assert pipeline.drawn == []


def test_a_repainted_picture_is_seen_in_full(generator: Generator) -> None:
    """Not only the part that is drawn again, since all of it leaves; and once."""
    big = Image.new("RGB", (512, 512), "lime")
    big.putpixel((0, 0), filters.RED)
    mask = pictures.spot(512, 512, (400, 400, 440, 440))
    sent = {"init_image": pictures.text(big), "mask": pictures.text(mask), "mask_padding": 8}
    with pytest.raises(RefusedByFilter, match="its colour"):
        _draw(generator, "fine", **sent)
    assert [image.size for image in filters.seen[0][0].images] == [(512, 512)]


def test_a_refused_image_leaves_the_others(generator: Generator) -> None:
    """They stay who they are, and the answer says which is missing and why."""
    generated = _draw(generator, "fine", num_images=3)
    result = generated.result
    assert [image.seed for image in result.images] == [1, 3]
    told = response.to_json(result, generated.delivery, generated.marks)
    assert [image["seed"] for image in told["images"]] == [1, 3]
    assert told["filter"] == {
        "name": FILTER["KLEIN_FILTER"],
        "refused": [{"image": 2, "seed": 2, "reason": "I do not like its colour"}],
        "marked": [],
    }
    assert any("refused image 2 (seed 2): I do not" in each for each in told["warnings"])


def test_where_every_image_is_refused_it_is_an_error(generator: Generator) -> None:
    """An answer without images would look like one that worked."""
    with pytest.raises(RefusedByFilter, match=r"image 1 \(seed 1\).*image 2 \(seed 2\): never"):
        _draw(generator, "never", num_images=2)


def test_images_can_be_marked(generator: Generator) -> None:
    """With a word in the answer, or with another image in the place of the first."""
    stamped = _draw(generator, "stamp").result
    assert stamped.images[0].image.getpixel((5, 5)) == filters.RED
    assert "marked image 1 (seed 1): stamped" in stamped.warnings[0]
    generated = _draw(generator, "label", num_images=1)
    told = response.to_json(generated.result, generated.delivery, generated.marks)["filter"]
    assert told["marked"] == [{"image": 1, "seed": 1, "reason": "labelled"}]
    assert generated.result.images[0].image.getpixel((5, 5)) == (1, 7, 31)


def test_requests_can_be_marked(generator: Generator) -> None:
    """The note is in the answer, of no image."""
    generated = _draw(generator, "odd")
    told = response.to_json(generated.result, generated.delivery, generated.marks)
    assert told["filter"]["marked"] == [{"image": None, "seed": None, "reason": "an odd word"}]
    assert "marked the request: an odd word" in told["warnings"][0]


def test_what_it_draws_on_is_a_copy(generator: Generator) -> None:
    """An image changes by Mark.image alone."""
    assert _draw(generator, "scrawl").result.images[0].image.getpixel((5, 5)) == (1, 7, 31)


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("fail", "OSError"),
        ("leave", "SystemExit"),
        ("wrong", "TypeError"),
        ("fail-late", "OSError"),
        ("shrink", "ValueError"),
    ],
)
def test_a_filter_that_fails_lets_nothing_through(
    generator: Generator, prompt: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The caller reads the kind of error, the log the rest, and the next request is judged."""
    with caplog.at_level(logging.ERROR), pytest.raises(FilterFailed, match=kind) as caught:
        _draw(generator, prompt)
    assert caught.value.retryable
    assert "secret" not in str(caught.value)
    assert "Traceback" in caplog.text
    assert _draw(generator, "fine").result.images


@pytest.mark.parametrize("prompt", ["hang", "hang-late"])
def test_a_filter_that_hangs_lets_nothing_through(impatient: Generator, prompt: str) -> None:
    """Within its time; others are judged beside it, and the process can end."""
    started = time.monotonic()
    with pytest.raises(FilterFailed, match=rf"no answer within {SHORT:g} s"):
        _draw(impatient, prompt)
    assert SHORT <= time.monotonic() - started < 5
    assert _draw(impatient, "fine").result.images
    assert impatient.is_ready
    judges = [each for each in threading.enumerate() if each.name == "klein-filter"]
    assert judges
    assert all(each.daemon for each in judges)


def test_filters_that_hang_in_every_thread_are_bounded_too(impatient: Generator) -> None:
    """What waits for a thread waits no longer; what nobody waits for is never asked. Until one of
    them ends klein is not ready."""
    generator = impatient
    assert generator.filter is not None

    async def scenario() -> list[Any]:
        request = fakes.request(prompt="hang")
        asked = (generator.run(request, generator.context()) for _ in range(6))
        return await asyncio.gather(*asked, return_exceptions=True)

    started = time.monotonic()
    assert [type(each) for each in asyncio.run(scenario())] == [FilterFailed] * 6
    assert time.monotonic() - started < 5
    assert generator.filter.as_dict()["hanging"] == 4
    assert not generator.is_ready
    filters.released.set()
    assert _draw(generator, "fine").result.images
    assert generator.is_ready
    assert [check.prompt for check, _ in filters.seen].count("hang") == 4


def test_what_is_drawn_does_not_wait_behind_what_is_not(generator: Generator) -> None:
    """Where requests crowd before a slow filter, finished images are judged first."""
    judge = generator.filter
    assert judge is not None

    async def scenario() -> None:
        jobs = [
            Job(fakes.context(), fakes.params(prompt=each)) for each in ("hang", "slow", "fine")
        ]
        hang, slow, fine = jobs
        asked = [asyncio.create_task(judge.check_request(each)) for each in (*[hang] * 3, slow)]
        while len(filters.seen) < 4:
            await asyncio.sleep(0.001)
        asked += [asyncio.create_task(judge.check_request(fine)) for _ in range(3)]
        await asyncio.sleep(0)
        await judge.check_images(fine, fakes.result(fakes.params(prompt="fine", seed=1)))
        filters.released.set()
        await asyncio.gather(*asked)

    asyncio.run(scenario())
    assert [check.stage for check, _ in filters.seen[4:]] == ["image", *["request"] * 3]


def test_the_deadline_of_a_job_holds_for_its_filter(pipeline: fakes.FakePipeline) -> None:
    """It is not the filter's fault then."""
    generator = fakes.generator(pipeline, **FILTER | {"KLEIN_FILTER_SECONDS": "9"})
    filters.released.clear()
    context = fakes.context(seconds=0.2)
    with pytest.raises(DeadlineExceeded):
        asyncio.run(generator.run(fakes.request(prompt="hang"), context))
    filters.released.set()
    generator.stop()


def test_requests_that_are_filtered_are_bounded(pipeline: fakes.FakePipeline) -> None:
    """As those that fetch are; a slow filter gathers no crowd."""
    generator = fakes.generator(pipeline, KLEIN_QUEUE_SIZE="1", KLEIN_FILTER=FILTER["KLEIN_FILTER"])

    async def scenario() -> list[Any]:
        request = fakes.request(prompt="slow")
        asked = (generator.run(request, generator.context()) for _ in range(2))
        return await asyncio.gather(*asked, return_exceptions=True)

    first, second = asyncio.run(scenario())
    assert isinstance(first, Generated)
    assert isinstance(second, QueueFull)
    generator.stop()


def test_it_is_never_called_in_the_gpus_thread(generator: Generator) -> None:
    """Nor in the loop's."""
    _draw(generator, "fine", num_images=3)
    assert len(filters.seen) == 4
    assert {thread for _, thread in filters.seen} == {"klein-filter"}


def test_no_previews_leave_where_there_is_a_filter(
    generator: Generator, pipeline: fakes.FakePipeline
) -> None:
    """They would show what the filter refuses later; the answer says so."""
    heard: list[Preview] = []
    wanted = PreviewRequest(heard.append, every=1, decoded=2)
    request = fakes.request(prompt="fine", num_inference_steps=4)
    generated = asyncio.run(generator.run(request, generator.context(previews=wanted)))
    assert heard == []
    assert NO_PREVIEWS in generated.result.warnings
    without = fakes.generator(pipeline)
    generated = asyncio.run(without.run(request, without.context(previews=wanted)))
    without.stop()
    assert len(heard) == 6
    assert generated.result.warnings == ()
    assert generated.result.filter is None


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no.such:judge", "ModuleNotFoundError"),
        ("tests.support.filters:nothing", "AttributeError"),
        ("tests.support.filters:NOT_CALLABLE", "no function"),
        ("tests.support.filters:later", "write def"),
        ("os.system('x')", "package.module:name"),
    ],
)
def test_a_filter_that_is_not_there_stops_the_start(name: str, says: str) -> None:
    """Rather than let everything through."""
    with pytest.raises(BadSetting, match="KLEIN_FILTER") as caught:
        Filter.from_settings(Settings.from_env({"KLEIN_FILTER": name}))
    assert says in str(caught.value)


def test_a_filter_that_exits_when_it_is_loaded_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a script without a guard does: klein would end without a word."""
    (tmp_path / "exiting.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BadSetting, match="KLEIN_FILTER: exiting:judge cannot be loaded"):
        Filter.from_settings(Settings.from_env({"KLEIN_FILTER": "exiting:judge"}))


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        ("a NUDE, please", "nude"),
        ("ｇｏｒｅ and more", "gore"),
        ("a nudé_figure", "nude"),
        ("n\u200bu\u00adde", "nude"),
        ("a nudge of gorenje", None),
        ("denuded hills", None),
    ],
)
def test_the_word_list_of_the_docs(
    pipeline: fakes.FakePipeline, prompt: str, word: str | None
) -> None:
    """It runs as docs/marks.md says: whole words, however they are written."""
    generator = fakes.generator(pipeline, KLEIN_FILTER="docs.word_list:check")
    try:
        if word is None:
            assert _draw(generator, prompt, negative_prompt="nude").result.images
        else:
            with pytest.raises(RefusedByFilter, match=f"not drawn here: {word}"):
                _draw(generator, prompt)
    finally:
        generator.stop()
