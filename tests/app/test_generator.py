import asyncio
import time
from collections.abc import Iterator

import pytest

from klein.app.generator import Generator
from klein.core import Progress
from klein.errors import Cancelled, DeadlineExceeded, InvalidRequest, LoraError, QueueFull
from tests.support import fakes

WITH_LORA = fakes.request(prompt="slow", loras=[{"path": "a/b"}])


@pytest.fixture
def pipeline() -> fakes.FakePipeline:
    return fakes.FakePipeline()


@pytest.fixture
def library() -> fakes.FakeLibrary:
    return fakes.FakeLibrary()


@pytest.fixture
def generator(pipeline: fakes.FakePipeline, library: fakes.FakeLibrary) -> Iterator[Generator]:
    made = fakes.generator(pipeline, library, KLEIN_QUEUE_SIZE="2")
    yield made
    pipeline.gate.set()
    library.fetched.set()
    made.stop()


def test_a_request_becomes_a_result(generator: Generator) -> None:
    """Resolved, drawn, with the delivery it asked for and every warning on the way."""
    request = fakes.request(width=250, output_format="webp", loras=[{"path": "missing"}])
    generated = asyncio.run(generator.run(request, generator.context("my-id")))
    assert generated.result.id == "my-id"
    assert generated.delivery.output_format == "webp"
    assert "rounded to 256" in generated.result.warnings[0]
    assert generated.result.params.loras[0].scale == 1.0


def test_what_cannot_be_drawn_is_refused_first(generator: Generator) -> None:
    """A size, or a link without a bucket, before anything is fetched."""
    for values in ({"width": 10}, {"return_type": "url"}):
        request = fakes.request(loras=[{"path": "a/b"}], **values)
        with pytest.raises(InvalidRequest):
            asyncio.run(generator.run(request, generator.context()))
    assert generator.library.asked == []  # type: ignore[attr-defined]


def test_a_job_that_fetches_does_not_hold_the_others(
    generator: Generator, pipeline: fakes.FakePipeline, library: fakes.FakeLibrary
) -> None:
    """While a LoRA is on its way, jobs that are ready go first."""
    library.fetched.clear()

    async def scenario() -> None:
        slow = asyncio.create_task(generator.run(WITH_LORA, generator.context()))
        await generator.run(fakes.request(prompt="quick"), generator.context())
        assert library.asked == ["a/b"]
        library.fetched.set()
        await slow

    asyncio.run(scenario())
    assert pipeline.drawn == ["quick", "slow"]


def test_jobs_that_fetch_have_places_of_their_own(
    generator: Generator, pipeline: fakes.FakePipeline, library: fakes.FakeLibrary
) -> None:
    """They are bounded, and however many there are, a job that needs none is not refused."""
    library.fetched.clear()

    async def scenario() -> None:
        fetching = [
            asyncio.create_task(generator.run(WITH_LORA, generator.context())) for _ in range(2)
        ]
        await asyncio.sleep(0.05)
        with pytest.raises(QueueFull, match="waiting for LoRAs"):
            await generator.run(WITH_LORA, generator.context())
        assert await generator.run(fakes.request(prompt="quick"), generator.context())
        library.fetched.set()
        await asyncio.gather(*fetching)
        assert await generator.run(WITH_LORA, generator.context())

    asyncio.run(scenario())
    assert pipeline.drawn[0] == "quick"


def test_cancelling_a_job_that_fetches(
    generator: Generator, pipeline: fakes.FakePipeline, library: fakes.FakeLibrary
) -> None:
    """It ends at once, its download too, and nothing is drawn."""
    library.fetched.clear()
    context = generator.context()

    async def scenario() -> None:
        task = asyncio.create_task(generator.run(WITH_LORA, context))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())
    assert isinstance(context.over, Cancelled)
    assert pipeline.drawn == []


def test_the_deadline_holds_while_a_library_hangs(
    pipeline: fakes.FakePipeline, library: fakes.FakeLibrary
) -> None:
    """Even a fetch that never looks up does not keep its caller."""
    held = fakes.FakeLibrary()
    held.find = lambda spec, on_bytes, **_: time.sleep(2)  # type: ignore[method-assign, assignment]
    generator = fakes.generator(pipeline, held, KLEIN_TIMEOUT="1")
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        asyncio.run(generator.run(WITH_LORA, generator.context()))
    assert time.monotonic() - started < 5
    generator.stop()


def test_a_fetch_that_fails_fails_the_job(
    generator: Generator, pipeline: fakes.FakePipeline
) -> None:
    """With lora_error "fail", without ever reaching the GPU."""
    request = fakes.request(loras=[{"path": "missing"}], lora_error="fail")
    with pytest.raises(LoraError, match="not there"):
        asyncio.run(generator.run(request, generator.context()))
    assert pipeline.drawn == []


def test_fetching_is_told(generator: Generator, library: fakes.FakeLibrary) -> None:
    """As progress of the stage "fetch"."""
    heard: list[Progress] = []
    library.fetched.clear()

    def on_progress(progress: Progress) -> None:
        heard.append(progress)
        library.fetched.set()

    asyncio.run(generator.run(WITH_LORA, generator.context(on_progress=on_progress)))
    assert heard[0].stage == "fetch"
    assert heard[-1].stage == "denoise"
