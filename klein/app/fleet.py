"""Many replicas as one engine: what one process in front of them does with every job.

A job's way: a place in the pool, or a refusal · its turn on a replica · progress and previews of it
come back, then what came of it · a replica that is lost on the way gives its jobs back to the pool,
and another draws the same images. A caller sees one job.

It belongs to one event loop. How replicas are reached is behind the protocol `Replicas`.
"""

import asyncio
import io
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextvars import Context
from dataclasses import dataclass, field, replace
from typing import Protocol, cast

from klein.app.account import CALLER
from klein.app.generator import Generator
from klein.app.metrics import Recorder
from klein.app.replica import Drawn, Heartbeat, Hello, Message, Order
from klein.core import (
    GeneratedImage,
    GenerationParams,
    GenerationResult,
    Job,
    ModelInfo,
    PipelineStats,
    Preview,
    Progress,
    RequestContext,
    ignore_progress,
)
from klein.engine.engine import REFUSALS, Engine, EngineStats, QueueView, Running, State
from klein.engine.pool import SLOTS, Entry, Pool, Worker
from klein.errors import InternalError, KleinError, NotReady, QueueFull
from klein.lora.library import LoraLibrary
from klein.lora.spec import LoraSpec
from klein.output.delivery import Bucket
from klein.request.resolve import Resolved
from klein.settings import Settings
from klein.sources.address import redacted
from klein.sources.cache import StoreStats

log = logging.getLogger(__name__)

HELLO_EVERY = 1.0
"""Seconds between two looks at which replicas there are."""
SILENCE = 30.0
"""Seconds without a word of a job after which its replica is taken to be lost."""
TRIES = 3
"""Replicas that may be lost with a job on them before it is given up."""


class ReplicaLost(Exception):
    """A replica that does not answer any more, or never did."""


class Replicas(Protocol):
    """The way to the replicas."""

    def draw(self, worker: str, order: Order) -> AsyncIterator[Message]:
        """What replica `worker` says of `order`; raises ReplicaLost."""
        ...

    async def cancel(self, id: str) -> None:
        """Stop an order at its next step, wherever it is drawn."""
        ...

    async def hello(self) -> list[Hello]:
        """Every replica that takes orders."""
        ...


@dataclass(eq=False, slots=True)
class _Flight:
    """A job from its place in the queue to what came of it."""

    job: Job
    resolved: Resolved
    future: "asyncio.Future[GenerationResult]"

    def order(self) -> Order:
        """As it is sent now."""
        context, now = self.job.context, time.monotonic()
        wanted = context.previews
        return Order(
            context.id,
            self.resolved,
            seconds=context.deadline - now,
            waited=now - context.submitted,
            progress=context.on_progress is not ignore_progress,
            every=wanted.every if wanted else 0,
            decoded=wanted.decoded if wanted else 0,
        )

    def hear(self, told: Progress | Preview) -> None:
        """Pass on what a replica tells on the way."""
        context = self.job.context
        if isinstance(told, Progress):
            context.on_progress(told)
        elif context.previews is not None:
            context.previews.receive(told)


@dataclass(frozen=True, slots=True)
class _Model:
    """The model of the replicas, as one of them described it, and what they all did."""

    info: ModelInfo
    _stats: PipelineStats

    def stats(self) -> PipelineStats:
        """As last heard, those that are gone included; memory is that of those there are."""
        return self._stats


@dataclass(slots=True)
class FleetStats:
    """Jobs by what their LoRAs took where they were sent, and those sent once more."""

    routed: Counter[str] = field(default_factory=Counter)
    drawn_again: int = 0


class Fleet:
    """The replicas and the queue in front of them: to entrypoints, one engine."""

    def __init__(self, replicas: Replicas, *, queue_size: int) -> None:
        self.routing = FleetStats()
        self._replicas = replicas
        self._pool: Pool[_Flight] = Pool(queue_size)
        self._model: _Model | None = None
        self._heard: dict[str, Hello] = {}
        self._stopped = False
        self._listeners: list[Callable[[], None]] = []
        self._flying: dict[Entry[_Flight], Worker[_Flight]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> "Fleet":
        """Begin to look for replicas."""
        self._spawn(self._watch())
        return self

    def stop(self) -> None:
        """Take no more jobs, and leave the replicas to whoever runs them."""
        self._stopped = True
        for task in self._tasks:
            task.cancel()

    # -- as an engine --------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """Ready once a replica was; jobs wait while none is."""
        if self._stopped:
            return State.STOPPED
        return State.READY if self._model else State.LOADING

    @property
    def pipeline(self) -> _Model:
        """The model; raises NotReady before a replica has loaded it."""
        if self._model is None:
            raise NotReady("no replica has loaded the model yet: try again in a minute")
        return self._model

    def stats(self) -> EngineStats:
        """State and queue now."""
        pool = self._pool
        return EngineStats(str(self.state), len(pool.waiting), bool(self._flying), pool.size)

    def queue(self) -> QueueView:
        """Who is drawn and who waits, those first that a replica has already."""
        workers = list(dict.fromkeys(self._flying.values()))
        running = tuple(Running(w.jobs[0].item.job, w.started) for w in workers)
        sent = [entry for worker in workers for entry in worker.jobs[1:]]
        waiting = tuple(entry.item.job for entry in (*sent, *self._pool.waiting))
        return QueueView(running, waiting, len(self._pool.workers))

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` when a job joins or leaves the queue; it must not raise."""
        self._listeners.append(listener)

    def require_place(self) -> None:
        """Raise NotReady or QueueFull if a job would be refused."""
        _ = self.pipeline
        if self._stopped:
            raise NotReady(REFUSALS[State.STOPPED])
        self._pool.require_place()

    def store_stats(self) -> StoreStats | None:
        """What the replicas fetched, those that are gone included, and what their hosts keep."""
        stores = [(hello.host, hello.store) for hello in self._heard.values() if hello.store]
        if not stores:
            return None
        kept = {host: store.bytes for host, store in stores}
        present = {worker.host.name for worker in self._pool.workers.values()}
        return StoreStats(
            sum(store.hits for _, store in stores),
            sum(store.fetches for _, store in stores),
            sum(size for host, size in kept.items() if host in present),
        )

    # -- jobs ----------------------------------------------------------------------------------

    def warm(self) -> dict[str, list[str]]:
        """The LoRA sets that each replica drew, the last one first."""
        return {id: list(reversed(worker.warm)) for id, worker in self._pool.workers.items()}

    def load(self) -> dict[str, int]:
        """The jobs that each replica has."""
        return {id: len(worker.jobs) for id, worker in self._pool.workers.items()}

    async def draw(self, resolved: Resolved, context: RequestContext) -> GenerationResult:
        """Have a replica draw it; raises a KleinError.

        Cancelling the waiter cancels the work and returns once the replica is free of it.
        """
        future: asyncio.Future[GenerationResult] = asyncio.get_running_loop().create_future()
        job = Job(context, resolved.params, (), resolved.warnings)
        entry = Entry(
            _Flight(job, resolved, future),
            lora_key(resolved.params.loras),
            CALLER.get(),
            _cost(resolved.params),
        )
        self._pool.put(entry)
        self._dispatch()
        try:
            await asyncio.wait({future}, timeout=context.deadline - time.monotonic())
            self._drop(entry)
            await asyncio.wait({future})
        except asyncio.CancelledError:
            context.cancel()
            self._drop(entry)
            if not future.done():
                self._spawn(self._replicas.cancel(context.id))
            await asyncio.wait({future})
            future.exception()  # heard, or asyncio would log it
            raise
        return future.result()

    def _drop(self, entry: Entry[_Flight]) -> None:
        """Fail a job that is over and still waits for a replica."""
        over = entry.item.job.context.over
        if over is not None and self._pool.remove(entry):
            entry.item.future.set_exception(over)
            self._changed()

    def _dispatch(self) -> None:
        """Send what can be sent."""
        while found := self._pool.next():
            entry, worker, warmth = found
            self.routing.routed[warmth] += 1
            self._flying[entry] = worker
            self._spawn(self._fly(entry, worker))
        self._changed()

    async def _fly(self, entry: Entry[_Flight], worker: Worker[_Flight]) -> None:
        """One job on one replica."""
        flight = entry.item
        outcome: Drawn | KleinError = NotReady("no replica could be kept to draw it: try again")
        lost = False
        try:
            outcome = await self._listen(flight, worker)
            lost = isinstance(outcome, NotReady | QueueFull)
        except ReplicaLost as error:
            log.warning("job %s lost replica %s: %s", flight.job.context.id, worker.id, error)
            lost = True
        except Exception as error:
            log.exception("job %s failed", flight.job.context.id)
            outcome = InternalError(f"{type(error).__name__} inside klein: see its log")
        del self._flying[entry]
        self._pool.done(entry, worker)
        if lost:
            self._leave(worker)
        if lost and self._may_try_again(entry):
            self._pool.put_back(entry)
            self.routing.drawn_again += 1
        else:
            over = flight.job.context.over if lost else None
            _settle(flight, over or outcome)
        self._dispatch()

    async def _listen(self, flight: _Flight, worker: Worker[_Flight]) -> Drawn | KleinError:
        messages = self._replicas.draw(worker.id, flight.order())
        while True:
            told = await _next(messages)
            if isinstance(told, Drawn | KleinError):
                return told
            if not isinstance(told, Heartbeat):
                flight.hear(told)

    def _may_try_again(self, entry: Entry[_Flight]) -> bool:
        entry.tries += 1
        return entry.tries < TRIES and entry.item.job.context.over is None

    # -- replicas ------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Keep the list of replicas, for as long as the process lives."""
        while True:
            try:
                self._greet(await self._replicas.hello())
            except Exception:
                log.exception("the replicas could not be asked how they are")
            await asyncio.sleep(HELLO_EVERY)

    def _greet(self, hellos: list[Hello]) -> None:
        ready = [hello for hello in hellos if hello.state is State.READY]
        self._heard |= {hello.id: hello for hello in hellos}
        if ready:
            heard = [hello.stats for hello in self._heard.values()]
            self._model = _Model(ready[0].info, _total(heard, [hello.stats for hello in ready]))
        if self._pool.members({hello.id: hello.host for hello in ready}):
            self._dispatch()

    def _leave(self, worker: Worker[_Flight]) -> None:
        """No more jobs for `worker`, unless it says hello again."""
        others = {
            id: each.host.name for id, each in self._pool.workers.items() if each is not worker
        }
        self._pool.members(others)

    def _changed(self) -> None:
        for listener in self._listeners:
            listener()

    def _spawn(self, work: "asyncio._CoroutineLike[None]") -> None:
        # In a context of its own: whatever the request that happens to be under way has in its
        # context, ids of calls among it, is not this job's.
        task = asyncio.create_task(work, context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class FleetGenerator(Generator):
    """A generator whose jobs are drawn by a fleet."""

    def __init__(
        self,
        fleet: Fleet,
        library: LoraLibrary,
        settings: Settings,
        bucket: Bucket | None,
        recorder: Recorder | None = None,
    ) -> None:
        self.fleet = fleet
        # A fleet has all that is asked of an engine, but for what `draw` does otherwise.
        super().__init__(cast("Engine", fleet), library, settings, bucket, recorder)

    async def draw(self, resolved: Resolved, context: RequestContext) -> GenerationResult:
        """Have a replica fetch, read and draw it; raises a KleinError."""
        return await self.fleet.draw(resolved, context)

    def warm(self) -> dict[str, list[str]]:
        """The LoRA sets that each replica drew, the last one first."""
        return self.fleet.warm()

    def places_per_caller(self) -> int:
        """As of one worker, and as many more as the replicas hold: one key keeps them all busy."""
        places = super().places_per_caller()
        if not places or self.settings.jobs_per_key:
            return places
        return places + SLOTS * len(self.fleet.load())

    def _observe(self) -> None:
        if self.recorder is not None:
            self.recorder.update(self.engine, self.fleet)


def _total(heard: list[PipelineStats], ready: list[PipelineStats]) -> PipelineStats:
    """What all that were `heard` of did, and the memory of those that are `ready`."""
    free = [stats.gpu_memory_free for stats in ready if stats.gpu_memory_free is not None]
    total = [stats.gpu_memory_total for stats in ready if stats.gpu_memory_total is not None]
    return PipelineStats(
        ready[0].speed_why,
        sum(stats.kernels_compiled for stats in heard),
        sum(stats.memory_retries for stats in heard),
        sum(stats.lora_switches for stats in heard),
        sum(free) if free else None,
        sum(total) if total else None,
    )


def lora_key(loras: tuple[LoraSpec, ...]) -> str:
    """The set of LoRAs, whatever their order and scales; empty without any."""
    return " + ".join(sorted({_reference(lora) for lora in loras}))


def _reference(lora: LoraSpec) -> str:
    name = redacted(lora.path)
    name += f"/{lora.weight_name}" if lora.weight_name else ""
    return name + (f"@{lora.revision}" if lora.revision else "")


def _cost(params: GenerationParams) -> float:
    """Work in megapixel steps."""
    pixels = params.width * params.height * params.num_images
    return pixels * params.num_inference_steps / 1e6


async def _next(messages: AsyncIterator[Message]) -> Message:
    """Raises ReplicaLost if there is none in SILENCE."""
    try:
        async with asyncio.timeout(SILENCE):
            return await anext(messages)
    except StopAsyncIteration:
        raise ReplicaLost("it ended without an answer") from None
    except TimeoutError:
        raise ReplicaLost(f"it said nothing for {SILENCE:.0f} s") from None


def _settle(flight: _Flight, outcome: Drawn | KleinError) -> None:
    if isinstance(outcome, KleinError):
        flight.future.set_exception(outcome)
    else:
        flight.future.set_result(_unpacked(outcome))


def _unpacked(drawn: Drawn) -> GenerationResult:
    """The result with its images, which stay encoded until somebody looks at their pixels."""
    from PIL import Image

    images = tuple(
        GeneratedImage(
            file.seed, Image.open(io.BytesIO(file.data)), file.unchanged_pixels, file.data
        )
        for file in drawn.files
    )
    return replace(drawn.result, images=images)
