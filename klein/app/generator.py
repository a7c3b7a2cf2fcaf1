"""What every entrypoint does with a request, once: resolve, prepare, run."""

import asyncio
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from klein import logs
from klein.app.account import CALLER, Account, outcome_of
from klein.app.estimate import StepTimes
from klein.app.filter import NO_PREVIEWS, Filter
from klein.app.lanes import Lanes
from klein.app.metrics import Recorder
from klein.app.prepare import must_fetch, prepare
from klein.core import (
    Delivery,
    GenerationResult,
    Job,
    PreviewRequest,
    Progress,
    RequestContext,
    ignore_progress,
    ignore_stage,
    new_id,
)
from klein.engine.engine import Engine, State
from klein.errors import QueueFull
from klein.lora.library import LoraLibrary
from klein.lora.spec import LoraSpec
from klein.output.delivery import Bucket
from klein.output.marks import Marks
from klein.output.response import require_bucket
from klein.request.resolve import Resolved, resolve
from klein.request.schema import GenerateRequest
from klein.settings import Settings
from klein.sources.fetch import Fetcher, ignore_size

if TYPE_CHECKING:
    from klein.app.tracing import Tracing

PREPARING_THREADS = 4
"""For what is at hand, and as many for what is fetched: no server can hold up the former."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Generated:
    """A result, how it was asked to leave, and what its images say of themselves."""

    result: GenerationResult
    delivery: Delivery
    marks: Marks


class Generator:
    """Turns requests into results on one engine. Entrypoints parse, call `run` and render."""

    def __init__(
        self,
        engine: Engine,
        library: LoraLibrary,
        settings: Settings,
        bucket: Bucket | None,
        recorder: Recorder | None = None,
        tracing: "Tracing | None" = None,
    ) -> None:
        """Raises BadSetting for a filter that cannot be loaded or marks that cannot be made."""
        self.engine = engine
        self.library = library
        self.settings = settings
        self.bucket = bucket
        self.marks = Marks.from_settings(settings)
        self.filter = Filter.from_settings(settings)
        self.recorder = recorder
        self.tracing = tracing
        on_received = recorder.received("image") if recorder else ignore_size
        self._fetcher = Fetcher(settings.fetch_hosts, on_received=on_received)
        self.step_times = StepTimes()
        self._preparing = 0
        self._places_per_caller = settings.jobs_per_key
        self._under_way: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(PREPARING_THREADS, "klein-prepare")
        self._fetching = ThreadPoolExecutor(settings.queue_size, "klein-fetch")
        self.lanes = Lanes()
        engine.on_change(self._observe)
        self._observe()

    def context(
        self,
        id: str = "",
        on_progress: Callable[[Progress], None] = ignore_progress,
        previews: PreviewRequest | None = None,
    ) -> RequestContext:
        """A context whose deadline is KLEIN_TIMEOUT from now; without `id` it makes its own."""
        deadline = time.monotonic() + self.settings.timeout
        on_stage = self.tracing.stage if self.tracing else ignore_stage
        return RequestContext(deadline, id or new_id(), on_progress, previews, on_stage)

    def resolve(self, request: GenerateRequest) -> Resolved:
        """Decide what will be drawn; raises InvalidRequest, or NotReady before a model is there."""
        require_bucket(request.return_type, self.bucket)
        info = self.engine.pipeline.info
        return resolve(
            request,
            info.spec,
            lambda: secrets.randbelow(2**32),
            prompt_loras=self.settings.prompt_loras,
            base_loras=tuple(LoraSpec(*named) for named in self.settings.base_loras),
            speed=info.speed,
            speeds=info.speeds,
        )

    async def run(self, request: GenerateRequest, context: RequestContext) -> Generated:
        """Draw what `request` asks for; raises a KleinError.

        Cancelling the waiter cancels the work and returns once the GPU is free of it.
        """
        with self._account(context.id) as account, self._share():
            resolved = self.resolve(request)
            account.params, account.speed = resolved.params, resolved.params.speed
            account.result = await self._run(resolved, context)
            return Generated(account.result, resolved.delivery, self.marks)

    def share_places(self) -> None:
        """Several callers have keys: none of them may hold all places."""
        half = max(1, self.settings.queue_size // 2)
        self._places_per_caller = self.settings.jobs_per_key or half

    def places_per_caller(self) -> int:
        """Jobs that each caller with a name may have under way; 0 where they are not bounded."""
        return self._places_per_caller

    @contextmanager
    def _share(self) -> Iterator[None]:
        """One of the jobs that the caller may have under way, if it has a name and they are
        bounded."""
        caller, most = CALLER.get(), self.places_per_caller()
        if caller is None or not most:
            yield
            return
        with self._lock:
            if self._under_way[caller] >= most:
                raise QueueFull(
                    f"{most} jobs of the key {caller!r} are under way already: try again later, "
                    "or raise KLEIN_JOBS_PER_KEY"
                )
            self._under_way[caller] += 1
        try:
            yield
        finally:
            with self._lock:
                self._under_way[caller] -= 1

    @contextmanager
    def _account(self, id: str) -> Iterator[Account]:
        """Tells trace, metrics and log how what is inside ends."""
        account = Account(id)
        traced = self.tracing.request(account) if self.tracing else nullcontext()
        with logs.fields(request_id=id), traced:
            try:
                yield account
            except BaseException as error:
                account.outcome = outcome_of(error)
                raise
            finally:
                if self.recorder is not None:
                    self.recorder.count(account)
                account.log()
                self._observe()

    def streaming(self) -> AbstractContextManager[None]:
        """Counts an event stream while it is open."""
        return self.recorder.stream() if self.recorder else nullcontext()

    def _observe(self) -> None:
        """Show the queue in the metrics as it is now."""
        if self.recorder is not None:
            self.recorder.update(self.engine, self.library)

    async def _run(self, resolved: Resolved, context: RequestContext) -> GenerationResult:
        self.engine.require_place()
        result = await self.draw(resolved, context)
        self.step_times.learn(result)
        return result

    async def render(self, generated: Generated, work: Callable[[Generated], T]) -> T:
        """`work` on a result, which encodes its images and may put them into the bucket: in a
        thread that only such work can hold up."""
        by_link = self.bucket is not None and generated.delivery.return_type == "url"
        lane = self.lanes.delivery if by_link else self.lanes.encoding
        return await lane.run(partial(work, generated))

    async def draw(self, resolved: Resolved, context: RequestContext) -> GenerationResult:
        """Fetch and read what a resolved request needs, draw it, and ask the filter; raises a
        KleinError."""
        if self.filter and context.previews:
            context = replace(context, previews=None)
            resolved = replace(resolved, warnings=(*resolved.warnings, NO_PREVIEWS))
        ahead = self.filter is not None or resolved.needs_preparing
        if ahead:
            job = await self._prepare(resolved, context)
        else:
            job = Job(context, resolved.params, (), resolved.warnings)
        result = await self.engine.run(job, admitted=ahead)
        if self.filter:
            result = await self.filter.check_images(job, result)
        return replace(result, inputs=job.inputs)

    @property
    def is_ready(self) -> bool:
        """Whether the model is loaded, and a filter that there is can answer."""
        is_stuck = self.filter is not None and self.filter.is_stuck
        return self.engine.state is State.READY and not is_stuck

    def retry_after(self) -> float | None:
        """Seconds until a place in the queue is free, as far as measured step times tell."""
        return self.step_times.wait(self.engine.queue(), ahead=0)

    def warm(self) -> dict[str, list[str]] | None:
        """The LoRA sets that each replica drew last, where there are several replicas."""
        return None

    async def _prepare(self, resolved: Resolved, context: RequestContext) -> Job:
        """`prepare` in a thread of its kind, then the filter."""
        with self._place():
            work = partial(prepare, resolved, context, self.library, self._fetcher)
            at_hand = partial(_unless, partial(must_fetch, resolved, self.library), work)
            job = await _within(context, self._threads, at_hand)
            if job is None:
                job = await _within(context, self._fetching, work)
            return await self.filter.check_request(job) if self.filter else job

    @contextmanager
    def _place(self) -> Iterator[None]:
        """One of the places for requests that fetch or are filtered, which are counted apart from
        the queue's."""
        with self._lock:
            if self._preparing >= self.settings.queue_size:
                raise QueueFull(
                    f"{self._preparing} requests are waiting for LoRAs, images or the filter: try "
                    "again later, or raise KLEIN_QUEUE_SIZE"
                )
            self._preparing += 1
        try:
            yield
        finally:
            with self._lock:
                self._preparing -= 1

    def stop(self) -> None:
        """End the engine and the threads beside it."""
        self.engine.stop()
        for threads in (self._threads, self._fetching):
            threads.shutdown(wait=False, cancel_futures=True)
        self.lanes.stop()


def _unless(not_here: Callable[[], bool], work: Callable[[], T]) -> T | None:
    return None if not_here() else work()


async def _within(context: RequestContext, threads: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    """`work` in one of `threads`. Whoever waits can leave at the deadline; it ends later."""
    loop = asyncio.get_running_loop()
    future = loop.run_in_executor(threads, copy_context().run, work)
    try:
        await asyncio.wait({future}, timeout=context.deadline - time.monotonic())
    except asyncio.CancelledError:
        context.cancel()
        raise
    if not future.done():
        context.check()
    return await future
