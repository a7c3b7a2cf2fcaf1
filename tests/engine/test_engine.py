import asyncio
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

import pytest

from klein.core import Job, Progress
from klein.engine.engine import Engine, EngineStats, State
from klein.errors import (
    Cancelled,
    DeadlineExceeded,
    InternalError,
    LoraError,
    ModelUnavailable,
    NotReady,
    OutOfMemory,
    QueueFull,
)
from tests.support import fakes


@pytest.fixture
def fake() -> fakes.FakePipeline:
    return fakes.FakePipeline()


@pytest.fixture
def engine(fake: fakes.FakePipeline) -> Iterator[Engine]:
    engine = Engine(lambda: fake, queue_size=2).start()
    engine.wait_ready(5)
    yield engine
    fake.gate.set()
    engine.stop()


def test_a_job_gets_its_result_and_progress(engine: Engine) -> None:
    """One report a step, in order, over all pictures."""
    steps: list[Progress] = []
    job = fakes.job(num_inference_steps=3, num_images=2, on_progress=steps.append)
    result = engine.submit(job).result(5)
    assert len(result.images) == 2
    assert [(p.image, p.step) for p in steps] == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]
    assert steps[-1].fraction == 1.0


def test_refused_while_loading() -> None:
    """Readiness says no, and a job sent all the same is told to come back."""
    hold = threading.Event()
    fake = fakes.FakePipeline()

    def load() -> fakes.FakePipeline:
        hold.wait(5)
        return fake

    engine = Engine(load, queue_size=1).start()
    assert engine.state is State.LOADING
    with pytest.raises(NotReady, match="loading"):
        engine.submit(fakes.job())
    hold.set()
    engine.wait_ready(5)
    assert engine.submit(fakes.job()).result(5).images
    engine.stop()


@pytest.mark.parametrize(
    ("raised", "seen"),
    [(ModelUnavailable("no such model"), "no such model"), (ZeroDivisionError(), "ZeroDivision")],
)
def test_a_failed_load_is_told_to_everyone(raised: Exception, seen: str) -> None:
    """To the door, to whoever waits and to later jobs."""
    heard: list[str] = []

    def load() -> fakes.FakePipeline:
        raise raised

    engine = Engine(load, queue_size=1, on_load_failed=lambda e: heard.append(str(e))).start()
    with pytest.raises((ModelUnavailable, InternalError), match=seen):
        engine.wait_ready(5)
    assert seen in heard[0]
    assert engine.state is State.FAILED
    with pytest.raises((ModelUnavailable, InternalError), match=seen):
        engine.submit(fakes.job())


def test_full_means_refused_at_once(engine: Engine, fake: fakes.FakePipeline) -> None:
    """One runs, two wait, the fourth is refused without waiting."""
    fake.gate.clear()
    first = engine.submit(fakes.job())
    assert fake.started.wait(5)
    waiting = [engine.submit(fakes.job()) for _ in range(2)]
    with pytest.raises(QueueFull, match="2 jobs are waiting"):
        engine.submit(fakes.job())
    fake.gate.set()
    for future in (first, *waiting):
        future.result(5)


def test_cancel_takes_effect_within_a_step(engine: Engine, fake: fakes.FakePipeline) -> None:
    """And the next job runs."""
    fake.gate.clear()
    job = fakes.job()
    future = engine.submit(job)
    assert fake.started.wait(5)
    engine.cancel(job)
    with pytest.raises(Cancelled):
        future.result(1)
    fake.gate.set()
    assert engine.submit(fakes.job()).result(5)


def test_a_cancelled_job_leaves_the_queue(engine: Engine, fake: fakes.FakePipeline) -> None:
    """It makes room at once and is never drawn."""
    fake.gate.clear()
    engine.submit(fakes.job(prompt="first"))
    assert fake.started.wait(5)
    queued = fakes.job(prompt="cancelled")
    future = engine.submit(queued)
    engine.cancel(queued)
    with pytest.raises(Cancelled):
        future.result(1)
    assert engine.stats().waiting == 0
    fake.gate.set()
    engine.submit(fakes.job(prompt="last")).result(5)
    assert fake.drawn == ["first", "last"]


def test_deadline_while_running(engine: Engine, fake: fakes.FakePipeline) -> None:
    """The time of a job includes its waiting."""
    fake.gate.clear()
    with pytest.raises(DeadlineExceeded, match="KLEIN_TIMEOUT"):
        engine.submit(fakes.job(seconds=0.05)).result(5)


def test_deadline_while_waiting(engine: Engine, fake: fakes.FakePipeline) -> None:
    """A job whose time is up fails then, not when the job before it is done."""
    fake.gate.clear()
    engine.submit(fakes.job())
    assert fake.started.wait(5)
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        asyncio.run(engine.run(fakes.job(seconds=0.1)))
    assert time.monotonic() - started < 2


def test_cancelling_the_waiter_frees_the_gpu_first(
    engine: Engine, fake: fakes.FakePipeline
) -> None:
    """When the caller's task ends cancelled, no step runs any more."""
    fake.gate.clear()

    async def scenario() -> None:
        task = asyncio.create_task(engine.run(fakes.job()))
        await asyncio.to_thread(fake.started.wait, 5)
        assert engine.stats().running
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not engine.stats().running

    asyncio.run(scenario())


def test_a_failed_job_leaves_the_next_one_clean(engine: Engine, fake: fakes.FakePipeline) -> None:
    """Known errors pass as they are, unknown ones without their text."""
    fake.fail = LoraError("no such LoRA")
    with pytest.raises(LoraError, match="no such LoRA"):
        engine.submit(fakes.job()).result(5)
    fake.fail = RuntimeError("/secret/path")
    with pytest.raises(InternalError) as caught:
        engine.submit(fakes.job()).result(5)
    assert "/secret/path" not in str(caught.value)
    fake.fail = None
    assert engine.submit(fakes.job()).result(5)


def test_a_worker_out_of_memory_is_unhealthy(fake: fakes.FakePipeline) -> None:
    """The job is told, those that wait and those that come are sent away, the door hears last."""
    heard: list[tuple[str, bool]] = []

    def on_unhealthy(error: Exception) -> None:
        heard.append((str(error), all(future.done() for future in futures)))

    engine = Engine(lambda: fake, queue_size=3, on_unhealthy=on_unhealthy).start()
    engine.wait_ready(5)
    fake.gate.clear()
    last = fakes.job()
    first = engine.submit(fakes.job(prompt="first"))
    assert fake.started.wait(5)
    futures = [engine.submit(job) for job in (fakes.job(), fakes.job(), last)]
    fake.fail = OutOfMemory("it did not fit")
    fake.gate.set()
    assert first.result(5)
    assert str(futures[0].exception(5)) == "it did not fit"
    for future in futures[1:]:
        assert isinstance(future.exception(5), NotReady)
        assert "out of GPU memory twice and is being replaced" in str(future.exception(5))
    with pytest.raises(NotReady, match="out of GPU memory twice and is being replaced"):
        engine.submit(fakes.job())
    assert engine.stats() == EngineStats("unhealthy", 0, False, 3)
    assert isinstance(last.context.over, Cancelled)
    engine.stop()
    assert heard == [("it did not fit", True)]
    assert fake.drawn == ["first"]


def test_unhealthy_while_stopping_is_stopped(fake: fakes.FakePipeline) -> None:
    """Nobody asks for another worker in place of one that was told to go."""
    heard: list[Exception] = []

    def generate(job: Job) -> NoReturn:
        fake.started.set()
        while not job.context.over:
            time.sleep(0.01)
        raise OutOfMemory("it did not fit")

    fake.generate = generate  # type: ignore[method-assign]
    engine = Engine(lambda: fake, queue_size=2, on_unhealthy=heard.append).start()
    engine.wait_ready(5)
    running, waiting = (engine.submit(fakes.job()) for _ in range(2))
    assert fake.started.wait(5)
    engine.stop()
    assert isinstance(running.exception(1), OutOfMemory)
    assert isinstance(waiting.exception(1), Cancelled)
    assert (engine.state, heard) == (State.STOPPED, [])


def test_stop_cancels_and_refuses(fake: fakes.FakePipeline) -> None:
    """Running and waiting jobs end, later ones are sent elsewhere."""
    fake.gate.clear()
    engine = Engine(lambda: fake, queue_size=2).start()
    engine.wait_ready(5)
    futures = [engine.submit(fakes.job()) for _ in range(2)]
    assert fake.started.wait(5)
    engine.stop()
    for future in futures:
        with pytest.raises(Cancelled):
            future.result(1)
    with pytest.raises(NotReady, match="shutting down"):
        engine.submit(fakes.job())


def test_what_was_admitted_finds_a_place(engine: Engine, fake: fakes.FakePipeline) -> None:
    """A job that fetched meanwhile is not sent away by a queue that filled up."""
    fake.gate.clear()
    engine.submit(fakes.job())
    assert fake.started.wait(5)
    for _ in range(2):
        engine.submit(fakes.job())
    with pytest.raises(QueueFull):
        engine.require_place()
    late = engine.submit(fakes.job(prompt="late"), admitted=True)
    fake.gate.set()
    assert late.result(5)
    assert fake.drawn[-1] == "late"


def test_the_queue_can_be_watched(engine: Engine, fake: fakes.FakePipeline) -> None:
    """Who is drawn since when and who waits in which order, told anew at each change."""
    heard: list[tuple[bool, int]] = []

    def listen() -> None:
        queue = engine.queue()
        heard.append((bool(queue.running), len(queue.waiting)))

    engine.on_change(listen)
    fake.gate.clear()
    jobs = [fakes.job(prompt=str(n)) for n in range(3)]
    before = time.monotonic()
    first = engine.submit(jobs[0])
    fake.started.wait(5)
    last = [engine.submit(job) for job in jobs[1:]][-1]
    queue = engine.queue()
    (running,) = queue.running
    assert (running.job, queue.waiting) == (jobs[0], (jobs[1], jobs[2]))
    assert before <= running.started <= time.monotonic()
    engine.cancel(jobs[1])
    assert engine.queue().waiting == (jobs[2],)
    assert heard[-3:] == [(True, 1), (True, 2), (True, 1)]
    fake.gate.set()
    for future in (first, last):
        future.result(5)
    assert heard[-1] == (True, 0)
