"""Server-sent events: the form on the wire, and a response that counts as an open stream."""

import json
import re
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager

from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from starlette.types import Receive, Scope, Send

from klein.app.events import Event, EventLog
from klein.errors import InvalidRequest

HEARTBEAT = 15.0
"""Seconds without an event after which a comment keeps the connection open."""
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
"""Proxies pass every event on at once."""


class EventStream(EventSourceResponse):
    """Events as they go over the wire; `place` is held while the stream is open."""

    def __init__(
        self, lines: AsyncIterator[bytes], place: AbstractContextManager[None], **headers: str
    ) -> None:
        super().__init__(lines, headers=HEADERS | headers)
        self._place = place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until the job's end, or until the caller leaves."""
        with self._place:
            await super().__call__(scope, receive, send)


async def lines_after(log: EventLog, after: int) -> AsyncIterator[bytes]:
    """The events of `log` after the event `after`, until its end."""
    async for event in log.follow(after, HEARTBEAT):
        yield KEEPALIVE_COMMENT if event is None else _line(event)


def _line(event: Event) -> bytes:
    return format_sse_event(event=event.name, data_str=json.dumps(event.data), id=str(event.id))


def last_event_id(value: str | None) -> int:
    """The header `Last-Event-ID` as a number, 0 without one; raises InvalidRequest."""
    if not value:
        return 0
    if not re.fullmatch(r"[0-9]{1,9}", value):
        raise InvalidRequest(
            "Last-Event-ID: must be the id of an event of this job", field="Last-Event-ID"
        )
    return int(value)
