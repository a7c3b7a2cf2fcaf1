"""One of many replicas: draws what the queue in front of them sends it, and tells how it goes."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace

from klein.app.generator import Generator
from klein.core import (
    GenerationResult,
    ModelInfo,
    PipelineStats,
    Preview,
    PreviewRequest,
    Progress,
    RequestContext,
    ignore_progress,
)
from klein.engine.engine import State
from klein.errors import Cancelled, InternalError, KleinError
from klein.output import response
from klein.output.response import EncodedImage
from klein.request.resolve import Resolved
from klein.sources.cache import StoreStats

log = logging.getLogger(__name__)

PROGRESS_EVERY = 0.25
"""Seconds between two reports of progress that leave a replica: each costs the queue's process
about a millisecond."""
HEARTBEAT = 5.0
"""Seconds without news of an order after which a replica says that it is still there."""
OVERTIME = 60.0
"""Seconds beyond its deadline after which a job is taken to hang: it looks at that every step."""


@dataclass(frozen=True, slots=True)
class Order:
    """A job on its way to a replica: what to draw, the `seconds` it may still take, those it has
    `waited`, whether somebody hears its progress, and how many previews to send, as in
    PreviewRequest."""

    id: str
    resolved: Resolved
    seconds: float
    waited: float
    progress: bool = True
    every: int = 0
    decoded: int = 0


@dataclass(frozen=True, slots=True)
class Drawn:
    """A result without its images, and these as files."""

    result: GenerationResult
    files: tuple[EncodedImage, ...]


@dataclass(frozen=True, slots=True)
class Hello:
    """A replica as it is now, and the `host` whose disk, with its `store` of fetched LoRAs, it
    shares with others."""

    id: str
    host: str
    state: State
    info: ModelInfo
    stats: PipelineStats
    store: StoreStats | None = None


class Heartbeat:
    """Nothing new: the order waits for the GPU, or for a long step."""


Message = Progress | Preview | Heartbeat | Drawn | KleinError
"""What a replica says of an order, at least every HEARTBEAT; the last one is what came of it."""


class Replica:
    """Draws orders with a generator whose model is loaded. It belongs to one event loop."""

    def __init__(self, id: str, host: str, generator: Generator) -> None:
        self.id = id
        self.host = host
        self._generator = generator
        self._work: dict[str, asyncio.Task[Drawn]] = {}

    @property
    def hangs(self) -> bool:
        """Whether the job on the GPU does not end: nothing but a new process helps."""
        latest = time.monotonic() - OVERTIME
        running = self._generator.engine.queue().running
        return any(each.job.context.deadline < latest for each in running)

    @property
    def state(self) -> State:
        """Its engine's."""
        return self._generator.engine.state

    def hello(self) -> Hello:
        """How it is."""
        pipeline = self._generator.engine.pipeline
        store = self._generator.library.store_stats()
        return Hello(self.id, self.host, self.state, pipeline.info, pipeline.stats(), store)

    async def draw(self, order: Order) -> AsyncGenerator[Message, None]:
        """Progress and previews of `order`, then what came of it; leaving early cancels it."""
        news: asyncio.Queue[Progress | Preview | None] = asyncio.Queue()
        work = asyncio.create_task(self._draw(order, _context(order, news)))
        work.add_done_callback(lambda _: news.put_nowait(None))
        self._work[order.id] = work
        try:
            while (told := await _next(news)) is not None:
                yield told
            yield _outcome(work, order)
        finally:
            del self._work[order.id]
            work.cancel()

    def cancel(self, id: str) -> None:
        """Stop an order at its next step; nothing happens to one that is over."""
        if work := self._work.get(id):
            work.cancel()

    async def _draw(self, order: Order, context: RequestContext) -> Drawn:
        result = await self._generator.draw(order.resolved, context)
        files = await asyncio.to_thread(
            response.encode, result, order.resolved.delivery, self._generator.marks
        )
        return Drawn(replace(result, images=(), inputs=None), tuple(files))


async def _next(
    news: "asyncio.Queue[Progress | Preview | None]",
) -> Progress | Preview | Heartbeat | None:
    try:
        return await asyncio.wait_for(news.get(), HEARTBEAT)
    except TimeoutError:
        return Heartbeat()


def _context(order: Order, news: "asyncio.Queue[Progress | Preview | None]") -> RequestContext:
    """A context whose progress and previews become news, in any thread."""
    loop, now = asyncio.get_running_loop(), time.monotonic()
    told = now

    def on_progress(progress: Progress) -> None:
        nonlocal told
        if time.monotonic() - told >= PROGRESS_EVERY:
            told = time.monotonic()
            loop.call_soon_threadsafe(news.put_nowait, progress)

    def receive(preview: Preview) -> None:
        loop.call_soon_threadsafe(news.put_nowait, preview)

    wanted = order.every or order.decoded
    previews = PreviewRequest(receive, order.every, order.decoded) if wanted else None
    return RequestContext(
        now + order.seconds,
        order.id,
        on_progress if order.progress else ignore_progress,
        previews,
        submitted=now - order.waited,
    )


def _outcome(work: "asyncio.Task[Drawn]", order: Order) -> Drawn | KleinError:
    """What came of the work, in a form that can travel."""
    if work.cancelled():
        return Cancelled("the job was cancelled")
    error = work.exception()
    if error is None:
        return work.result()
    if isinstance(error, KleinError):
        return error
    log.error("job %s failed", order.id, exc_info=error)
    return InternalError(f"{type(error).__name__} inside klein: see its log for {order.id}")
