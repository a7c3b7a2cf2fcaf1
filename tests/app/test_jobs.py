import asyncio
import gc
import random
import weakref
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from klein.app.estimate import StepTimes
from klein.app.events import KEPT, EventLog
from klein.app.job import LAST_EVENTS, Job, JobSpec, Status
from klein.app.jobs import JobRegistry
from klein.core import Timings
from klein.engine.engine import QueueView
from klein.errors import Conflict, NotFound, NotReady, OutOfMemory, QueueFull
from klein.output.response import EncodedImage
from tests.support import fakes

SPEC = JobSpec(fakes.request(num_inference_steps=4))


def run(
    scenario: Callable[[JobRegistry, fakes.FakePipeline], Awaitable[None]], **settings: str
) -> None:
    """A scenario on a registry of a fake pipeline, all of it stopped at the end."""
    pipeline = fakes.FakePipeline()
    generator = fakes.generator(pipeline, **settings)

    async def whole() -> None:
        registry = JobRegistry(generator)
        await scenario(registry, pipeline)
        pipeline.gate.set()
        await registry.stop()

    asyncio.run(whole())
    generator.stop()


def last_events(job: Job) -> list[str]:
    return [e.name for e in job.events.after(0) if e.name in LAST_EVENTS.values()]


def code(job: Job) -> object:
    return job.error["code"] if job.error else None


async def processing(job: Job) -> None:
    while job.status is not Status.PROCESSING:
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("seed", range(5))
def test_every_accepted_job_ends_exactly_once(seed: int) -> None:
    """Whatever is refused, fails, is cancelled, repeated or asked for twice at once."""
    dice = random.Random(seed)

    async def scenario(registry: JobRegistry, pipeline: fakes.FakePipeline) -> None:
        accepted: list[Job] = []

        async def caller(number: int) -> None:
            await asyncio.sleep(dice.random() / 10)
            loras = [{"path": dice.choice(["a", "missing"])}] if dice.random() < 0.3 else []
            spec = JobSpec(fakes.request(num_inference_steps=3, loras=loras, lora_error="fail"))
            try:
                job = await registry.create(None, spec, f"job-{number % 40}")
            except (QueueFull, Conflict):
                return
            accepted.append(job)
            if dice.random() < 0.5:
                await asyncio.sleep(dice.random() / 50)
                try:
                    assert (await registry.cancel(None, job.id)).status is Status.CANCELED
                except Conflict:
                    assert job.over

        async def trouble() -> None:
            for fault in (None, OSError("no"), None, ValueError("no"), None):
                pipeline.fail = fault
                await asyncio.sleep(0.02)

        await asyncio.gather(trouble(), *(caller(number) for number in range(60)))
        for job in accepted:
            await asyncio.wait_for(job.finished.wait(), 5)
            assert job.over
            assert last_events(job) == [LAST_EVENTS[job.status]]
            assert [event.name for event in job.events.after(0)][-1] in LAST_EVENTS.values()
            assert (job.output is not None) == (job.status is Status.SUCCEEDED)
        page, _ = registry.page(None, 100, None)
        assert set(page) == set(accepted)
        queue = registry._generator.engine.queue()
        assert (queue.running, queue.waiting) == ((), ())

    run(scenario, KLEIN_QUEUE_SIZE="4")


def test_stopping_ends_what_runs_and_waits() -> None:
    """As failed, to be tried again elsewhere; streams end; nothing new is taken."""

    async def scenario(registry: JobRegistry, pipeline: fakes.FakePipeline) -> None:
        pipeline.gate.clear()
        done = await registry.create(None, SPEC)
        pipeline.gate.set()
        await done.finished.wait()
        pipeline.gate.clear()
        running, queued = await registry.create(None, SPEC), await registry.create(None, SPEC)
        await processing(running)
        names: list[str] = []

        async def watch() -> None:
            async for event in queued.events.follow(0, 30):
                names.append(event.name if event else "")

        watcher = asyncio.create_task(watch())
        await registry.stop()
        await asyncio.wait_for(watcher, 1)
        assert names[-1] == "failed"
        for job in (running, queued):
            assert (job.status, last_events(job)) == (Status.FAILED, ["failed"])
            assert code(job) == "not_ready"
        assert done.status is Status.SUCCEEDED
        with pytest.raises(NotReady):
            await registry.create(None, SPEC)

    run(scenario)


def test_an_engine_that_is_stopped_or_runs_out_of_memory_ends_its_jobs() -> None:
    """Both ways its jobs fail with what the engine says, and nobody is left waiting."""

    async def stopped(registry: JobRegistry, pipeline: fakes.FakePipeline) -> None:
        pipeline.gate.clear()
        jobs = [await registry.create(None, SPEC) for _ in range(3)]
        await processing(jobs[0])
        await asyncio.to_thread(registry._generator.engine.stop)
        for job in jobs:
            await asyncio.wait_for(job.finished.wait(), 5)
            assert code(job) == "not_ready"

    async def out_of_memory(registry: JobRegistry, pipeline: fakes.FakePipeline) -> None:
        pipeline.fail = OutOfMemory("it did not fit")
        job = await registry.create(None, SPEC)
        await job.finished.wait()
        assert (job.status, code(job)) == (Status.FAILED, "out_of_memory")

    run(stopped)
    run(out_of_memory)


def test_cancelling_before_the_first_step_of_its_task() -> None:
    """A task that never began has an end too."""

    async def scenario(registry: JobRegistry, pipeline: fakes.FakePipeline) -> None:
        creating = asyncio.create_task(registry.create(None, SPEC, "a"))
        while not registry._jobs:
            await asyncio.sleep(0)
        registry._jobs[None, "a"].cancel_asked = True
        registry._jobs[None, "a"].task.cancel()
        job = await creating
        await asyncio.wait_for(job.finished.wait(), 1)
        assert (job.status, last_events(job)) == (Status.CANCELED, ["canceled"])
        assert pipeline.drawn == []

    run(scenario)


def test_who_repeats_a_refused_call_is_refused_too() -> None:
    """At the same moment; nothing stays of either."""

    async def scenario(registry: JobRegistry, pipeline: fakes.FakePipeline) -> None:
        pipeline.gate.clear()
        running = await registry.create(None, SPEC)
        await processing(running)
        await registry.create(None, SPEC)
        both = [registry.create(None, SPEC, "same") for _ in range(2)]
        errors = await asyncio.gather(*both, return_exceptions=True)
        assert [type(error) for error in errors] == [QueueFull, QueueFull]
        with pytest.raises(NotFound):
            registry.get(None, "same")

    run(scenario, KLEIN_QUEUE_SIZE="1")


def test_finished_jobs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest finished one goes for a new one; jobs under way never do."""
    monkeypatch.setattr("klein.app.jobs.MAX_JOBS", 3)

    async def scenario(registry: JobRegistry, pipeline: fakes.FakePipeline) -> None:
        jobs = []
        for _ in range(5):
            jobs.append(await registry.create(None, SPEC))
            await jobs[-1].finished.wait()
        assert registry.page(None, 10, None)[0] == jobs[:1:-1]
        pipeline.gate.clear()
        for _ in range(3):
            jobs.append(await registry.create(None, SPEC))
        assert registry.page(None, 10, None)[0] == jobs[:4:-1]
        with pytest.raises(QueueFull, match="3 jobs are under way"):
            await registry.create(None, SPEC)

    run(scenario)


def test_nothing_is_held_that_is_not_kept() -> None:
    """The images of jobs that had to make room are gone at once, before Python collects its
    garbage; what a failed job was asked, which its exception's frames refer to, is gone then."""

    def held() -> int:
        return sum(isinstance(kept, EncodedImage) for kept in gc.get_objects())

    async def scenario(registry: JobRegistry, pipeline: fakes.FakePipeline) -> None:
        pipeline.noise = True
        for _ in range(3):
            job = await registry.create(None, JobSpec(fakes.request(num_images=4)))
            await job.finished.wait()
        await asyncio.sleep(0.01)
        assert held() == before + 4
        pipeline.fail = OutOfMemory("no")
        request = fakes.request()
        asked = weakref.ref(request)
        job = await registry.create(None, JobSpec(request))
        await job.finished.wait()
        del request
        await asyncio.sleep(0.01)
        pipeline.fail = None
        gc.collect()
        assert (code(job), asked()) == ("out_of_memory", None)

    gc.collect()
    before = held()
    gc.disable()
    try:
        run(scenario, KLEIN_JOBS_KEEP_MB="1")
    finally:
        gc.enable()


def test_tokens_and_images_are_not_told_again() -> None:
    """`input` is shown without what follows an address's path, and long texts by their length."""

    async def scenario(registry: JobRegistry, pipeline: fakes.FakePipeline) -> None:
        request = fakes.request(loras=[{"path": "https://host/a.safetensors?token=secret"}])
        job = await registry.create(None, JobSpec(request))
        assert job.as_dict()["input"]["loras"] == [{"path": "https://host/a.safetensors"}]

    run(scenario)


def test_a_history_is_thinned() -> None:
    """The newest of each kind stay, in order; the last event is never dropped."""
    log = EventLog()
    for step in range(300):
        log.append("progress", {"step": step})
        log.append("preview", {"step": step})
        log.append("status", {"step": step})
    kept = log.after(0)
    assert [event.id for event in kept] == sorted({event.id for event in kept})
    for name, most in KEPT.items():
        steps = [event.data["step"] for event in kept if event.name == name]
        assert steps == list(range(300 - most, 300))
    log.close("failed", {})
    assert {event.name for event in log.after(0)} == {"progress", "status", "failed"}
    assert [event.name for event in log.after(900)] == ["failed"]


def test_heartbeats_come_while_nothing_happens() -> None:
    """None stands for one; the events after it are not lost."""

    async def scenario() -> None:
        log = EventLog()
        heard = log.follow(0, 0.01)
        assert await anext(heard) is None
        log.append("status", {})
        event = await anext(heard)
        assert event is not None
        assert (event.id, event.name) == (1, "status")
        log.close("canceled", {})
        assert [event.name async for event in heard if event] == ["canceled"]

    asyncio.run(scenario())


def test_a_slow_reader_misses_no_end() -> None:
    """Events that come while it reads are given to it before the stream ends."""

    async def scenario() -> None:
        log = EventLog()
        log.append("status", {})
        names = []
        async for event in log.follow(0, 5):
            assert event is not None
            names.append(event.name)
            if len(names) == 1:
                log.append("progress", {})
                log.close("completed", {})
        assert names == ["status", "progress", "completed"]

    asyncio.run(scenario())


def test_step_times() -> None:
    """Nothing before the first result; then in proportion to tokens, steps, images and guidance,
    new results weighing 0.3."""
    times = StepTimes()
    params = fakes.params(width=256, height=256, num_inference_steps=10, guidance_scale=1)
    assert times.seconds(params) is None
    assert times.wait(QueueView((), ()), 0) is None
    result = fakes.result(params)
    times.learn(replace(result, timings=Timings(total=1.0)))
    assert times.seconds(params) is None  # nothing was measured
    times.learn(replace(result, timings=Timings(text=0.2, denoise=1.0, decode=0.5)))
    assert times.seconds(params) == pytest.approx(1.7)
    assert times.seconds(params, denoised=0.5) == pytest.approx(0.5 + 0.5)
    for values, seconds in (
        ({"num_inference_steps": 20}, 2.7),
        ({"guidance_scale": 2.0}, 2.7),
        ({"width": 512}, 2.7),
        ({"num_images": 2}, 3.2),
    ):
        assert times.seconds(replace(params, **values)) == pytest.approx(seconds)
    times.learn(replace(result, timings=Timings(text=0.2, denoise=2.0, decode=0.5)))
    assert times.seconds(params) == pytest.approx(0.7 + 1.3)
    waiting = tuple(replace(fakes.job(), params=params) for _ in range(2))
    assert times.wait(QueueView((), waiting), 1) == pytest.approx(2.0)
    assert times.wait(QueueView((), waiting, workers=2), 1) == 0.0
    assert times.wait(QueueView((), waiting, workers=2), 2) == pytest.approx(2.0)
