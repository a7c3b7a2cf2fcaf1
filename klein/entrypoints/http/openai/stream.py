"""An image under way as server-sent events: partial images, then the finished ones."""

import asyncio
import contextlib
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from starlette.requests import Request

from klein.app.generator import Generated, Generator
from klein.core import Preview, PreviewRequest
from klein.entrypoints.http.errors import http_status, openai_detail
from klein.entrypoints.http.events import HEARTBEAT
from klein.entrypoints.http.generate import run_while_connected
from klein.entrypoints.http.openai.answers import Kind, completed_events, partial_event
from klein.entrypoints.http.openai.schema import Asked
from klein.errors import InternalError, KleinError

log = logging.getLogger(__name__)


class Drawing:
    """The work on one request, and the previews that come out of it."""

    def __init__(self, generator: Generator, asked: Asked, request: Request, id: str) -> None:
        """Starts the work; it is cancelled when the caller hangs up."""
        self._asked = asked
        self._marks = generator.marks
        self._id = id
        self._news: asyncio.Queue[Preview | None] = asyncio.Queue()
        self._stirred = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        wanted = PreviewRequest(self._receive, decoded=asked.partial_images)
        context = generator.context(id, previews=wanted if asked.partial_images else None)
        self._work = asyncio.create_task(
            run_while_connected(generator, asked.request, context, request)
        )
        self._work.add_done_callback(self._ended)

    def _receive(self, preview: Preview) -> None:
        """Callable in any thread; a loop that is gone has nobody left to tell."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._hear, preview)

    def _hear(self, news: Preview | None) -> None:
        self._news.put_nowait(news)
        self._stirred.set()

    def _ended(self, work: "asyncio.Task[Generated]") -> None:
        if not work.cancelled():
            work.exception()  # heard, or asyncio would log it
        self._hear(None)

    async def first_news(self) -> None:
        """Wait for a preview, the end, or HEARTBEAT seconds. Raises the KleinError of work that
        has failed by then, which the status of the answer can still tell."""
        try:
            await asyncio.wait_for(self._stirred.wait(), HEARTBEAT)
        except TimeoutError:
            return
        except asyncio.CancelledError:
            self._work.cancel()
            raise
        if self._work.done():
            with self._asked.own_names():
                await self._work

    async def lines(self, kind: Kind) -> AsyncIterator[bytes]:
        """The events as they go over the wire; an error is the last of them."""
        seen: Counter[int] = Counter()
        try:
            async for preview in self._previews():
                if preview is None:
                    yield KEEPALIVE_COMMENT
                    continue
                index = seen[preview.image]
                seen[preview.image] += 1
                made = (self._asked, preview, index, kind, self._marks)
                yield _line(await asyncio.to_thread(partial_event, *made))
            with self._asked.own_names():
                generated = await self._work
            for event in await asyncio.to_thread(completed_events, self._asked, generated, kind):
                yield _line(event)
        except KleinError as error:
            yield self._failure(error)
        except Exception:
            log.exception("request %s failed", self._id)
            yield self._failure(InternalError("klein failed: see its log"))
        finally:
            self._work.cancel()

    async def _previews(self) -> AsyncIterator[Preview | None]:
        """Previews until the work ends, None for HEARTBEAT seconds without one."""
        while True:
            try:
                news = await asyncio.wait_for(self._news.get(), HEARTBEAT)
            except TimeoutError:
                yield None
                continue
            if news is None:
                return
            yield news

    def _failure(self, error: KleinError) -> bytes:
        detail = openai_detail(error.as_dict(self._id), http_status(error.code))
        return format_sse_event(event="error", data_str=json.dumps({"error": detail}))


def _line(event: dict[str, Any]) -> bytes:
    return format_sse_event(event=event["type"], data_str=json.dumps(event))
