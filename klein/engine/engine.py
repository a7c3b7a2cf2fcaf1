"""One GPU: a bounded queue and one worker thread that owns the pipeline.

A job's way: `submit` refuses at once when the queue is full · the worker takes the oldest · every
step checks its deadline and its cancel flag · its future gets the result or a KleinError.

A job that runs out of memory did so twice, for the pipeline frees what it can and tries again: the
worker is unhealthy from then on, answers what it owes and waits to be replaced by its entrypoint.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from klein.core import GenerationResult, ImagePipeline, Job
from klein.errors import InternalError, KleinError, NotReady, OutOfMemory, QueueFull

log = logging.getLogger(__name__)


class State(StrEnum):
    """What readiness is made of."""

    LOADING = "loading"
    READY = "ready"
    UNHEALTHY = "unhealthy"
    FAILED = "failed"
    STOPPED = "stopped"


REFUSALS = {
    State.UNHEALTHY: "this worker ran out of GPU memory twice and is being replaced: "
    "try again in a minute",
    State.STOPPED: "klein is shutting down: try another worker",
}
"""Why a worker whose model is loaded takes no jobs."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The state and its queue now."""

    state: str
    waiting: int
    running: bool
    queue_size: int


@dataclass(frozen=True, slots=True)
class Running:
    """A job on a GPU since `started`, on the clock of time.monotonic."""

    job: Job
    started: float


@dataclass(frozen=True, slots=True)
class QueueView:
    """The jobs on the GPUs of `workers`, and those that wait, the next one first."""

    running: tuple[Running, ...]
    waiting: tuple[Job, ...]
    workers: int = 1


@dataclass(eq=False, slots=True)
class _Entry:
    """A job in the queue, and the context of whoever asked for it, in which it is drawn."""

    job: Job
    future: "Future[GenerationResult]"
    context: Context = field(default_factory=copy_context)


class Engine:
    """Runs jobs one at a time on the pipeline that `load` returns, loaded in the background."""

    def __init__(
        self,
        load: Callable[[], ImagePipeline],
        *,
        queue_size: int,
        on_ready: Callable[[], None] = lambda: None,
        on_load_failed: Callable[[KleinError], None] = lambda _: None,
        on_unhealthy: Callable[[KleinError], None] = lambda _: None,
    ) -> None:
        """`on_unhealthy` is called once, in the worker thread, after all futures are done."""
        self._load = load
        self._on_ready = on_ready
        self._on_load_failed = on_load_failed
        self._on_unhealthy = on_unhealthy
        self._queue_size = queue_size
        self._waiting: list[_Entry] = []
        self._running: Job | None = None
        self._started = 0.0
        self._listeners: list[Callable[[], None]] = []
        self._wake = threading.Condition()
        self._loaded = threading.Event()
        self._pipeline: ImagePipeline | None = None
        self.state = State.LOADING
        self.error: KleinError | None = None
        self._thread = threading.Thread(target=self._work, name="klein-gpu", daemon=True)

    def start(self) -> "Engine":
        """Begin to load. Jobs are refused with NotReady until that is done."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """Cancel everything and end the worker; returns when the GPU is free."""
        with self._wake:
            self.state = State.STOPPED
            for entry in self._waiting:
                entry.job.context.cancel()
            if self._running:
                self._running.context.cancel()
            self._wake.notify_all()
        self._thread.join()

    def wait_ready(self, timeout: float | None = None) -> ImagePipeline:
        """Block until the model is loaded; raises why it could not be."""
        self._loaded.wait(timeout)
        if self.error:
            raise self.error
        return self.pipeline

    @property
    def pipeline(self) -> ImagePipeline:
        """The loaded pipeline; raises NotReady before that."""
        if self._pipeline is None:
            raise self.error or NotReady("the model is still loading: try again in a minute")
        return self._pipeline

    def stats(self) -> EngineStats:
        """State and queue now."""
        with self._wake:
            return EngineStats(
                str(self.state), len(self._waiting), self._running is not None, self._queue_size
            )

    def queue(self) -> QueueView:
        """Who is drawn and who waits."""
        with self._wake:
            waiting = tuple(entry.job for entry in self._waiting)
            running = (Running(self._running, self._started),) if self._running else ()
            return QueueView(running, waiting)

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` when a job joins or leaves the queue, in whatever thread that happens;
        it must not raise."""
        self._listeners.append(listener)

    def _changed(self) -> None:
        for listener in self._listeners:
            listener()

    def require_place(self) -> None:
        """Raise NotReady or QueueFull if a job submitted now would be refused."""
        _ = self.pipeline
        with self._wake:
            self._require_place()

    def _require_place(self) -> None:
        self._require_ready()
        if len(self._waiting) >= self._queue_size:
            raise QueueFull(
                f"{self._queue_size} jobs are waiting already: try again later, "
                "or raise KLEIN_QUEUE_SIZE"
            )

    def _require_ready(self) -> None:
        if why := REFUSALS.get(self.state):
            raise NotReady(why)

    def submit(self, job: Job, *, admitted: bool = False) -> Future[GenerationResult]:
        """Queue `job`; raises NotReady or QueueFull at once.

        One that was `admitted` earlier, and fetched LoRAs since, finds a place in a full queue.
        """
        _ = self.pipeline
        with self._wake:
            (self._require_ready if admitted else self._require_place)()
            entry = _Entry(job, Future())
            self._waiting.append(entry)
            self._wake.notify_all()
        self._changed()
        return entry.future

    async def run(self, job: Job, *, admitted: bool = False) -> GenerationResult:
        """Submit and wait. Cancelling the waiter cancels the job and waits for the GPU.

        A job whose deadline passes while it waits in the queue fails then, not when its turn comes.
        """
        waiter = asyncio.wrap_future(self.submit(job, admitted=admitted))
        try:
            while not waiter.done() and (left := job.context.deadline - time.monotonic()) > 0:
                await asyncio.wait({waiter}, timeout=left)
            self._drop(job)
            await asyncio.wait({waiter})
        except asyncio.CancelledError:
            self.cancel(job)
            await asyncio.wait({waiter})
            waiter.exception()  # heard, or asyncio would log it
            raise
        return waiter.result()

    def cancel(self, job: Job) -> None:
        """Stop `job` within one step, or take it out of the queue."""
        job.context.cancel()
        self._drop(job)

    def _drop(self, job: Job) -> None:
        """Fail a job that is over and still in the queue."""
        with self._wake:
            entry = next((entry for entry in self._waiting if entry.job is job), None)
            over = job.context.over
            if entry is None or over is None:
                return
            self._waiting.remove(entry)
        entry.future.set_exception(over)
        self._changed()

    # -- the worker thread ---------------------------------------------------------------------

    def _work(self) -> None:
        try:
            self._pipeline = self._load()
        except KleinError as error:
            self._fail(error)
            return
        except Exception as error:
            log.exception("the model could not be loaded")
            self._fail(InternalError(f"loading failed with {type(error).__name__}: see the log"))
            return
        with self._wake:
            if self.state is State.LOADING:
                self.state = State.READY
        self._loaded.set()
        self._on_ready()
        while taken := self._take():
            self._changed()
            self._run(taken)
            del taken  # its result, or the frames of its error, would live until the next job

    def _fail(self, error: KleinError) -> None:
        self.error = error
        self.state = State.FAILED
        self._loaded.set()
        self._on_load_failed(error)

    def _take(self) -> _Entry | None:
        with self._wake:
            while not self._waiting:
                if self.state is State.STOPPED:
                    return None
                self._wake.wait()
            entry = self._waiting.pop(0)
            self._running, self._started = entry.job, time.monotonic()
            return entry

    def _run(self, entry: _Entry) -> None:
        job, future = entry.job, entry.future
        try:
            job.context.check()
            result = entry.context.run(self.pipeline.generate, job)
        except OutOfMemory as error:
            waiting = self._become_unhealthy()
            self._settle(future.set_exception, error)
            self._turn_away(waiting, error)
        except KleinError as error:
            self._settle(future.set_exception, error)
        except Exception as error:
            failure = entry.context.run(self._unknown, job, error)
            self._settle(future.set_exception, failure)
        else:
            self._settle(future.set_result, result)

    def _become_unhealthy(self) -> list[_Entry]:
        """Take no more jobs, unless klein is stopping anyway; the jobs that wait."""
        with self._wake:
            if self.state is State.STOPPED:
                return []
            self.state = State.UNHEALTHY
            waiting, self._waiting = self._waiting, []
            return waiting

    def _turn_away(self, waiting: list[_Entry], error: OutOfMemory) -> None:
        """Refuse who waits, and ask the entrypoint for another worker."""
        for entry in waiting:
            entry.job.context.cancel()
            entry.future.set_exception(NotReady(REFUSALS[State.UNHEALTHY]))
        if self.state is State.UNHEALTHY:
            self._on_unhealthy(error)

    def _unknown(self, job: Job, error: Exception) -> InternalError:
        log.error("job %s failed", job.context.id, exc_info=error)
        return InternalError(
            f"{type(error).__name__} inside klein: see its log for {job.context.id}"
        )

    def _settle(self, settle: Callable[[Any], None], outcome: Any) -> None:
        """The GPU is free before anybody hears of the outcome."""
        with self._wake:
            self._running = None
        settle(outcome)
