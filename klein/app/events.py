"""What happened to one job, in order: a bounded history that any number of readers follow."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

KEPT = {"status": 32, "progress": 64, "preview": 2}
"""Of these the newest so many are kept; of every other kind, which ends a job, all are."""


@dataclass(frozen=True, slots=True)
class Event:
    """`id` counts from 1 within its job; `data` is JSON."""

    id: int
    name: str
    data: dict[str, Any]


class EventLog:
    """The events of one job. All of it belongs to one event loop."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._last_id = 0
        self._news = asyncio.Event()
        self.closed = False

    def append(self, name: str, data: dict[str, Any]) -> None:
        """Add an event, and drop the oldest of its kind if there are too many."""
        self._last_id += 1
        self._events.append(Event(self._last_id, name, data))
        same = [event for event in self._events if event.name == name]
        if len(same) > KEPT.get(name, len(same)):
            self._events.remove(same[0])
        self._tell()

    def close(self, name: str, data: dict[str, Any]) -> None:
        """Add the last event; previews are of no use from now on."""
        self._events = [event for event in self._events if event.name != "preview"]
        self.closed = True
        self.append(name, data)

    def after(self, id: int) -> list[Event]:
        """The events that are kept and came after the event `id`; 0 is before the first, and so is
        an id that no event has had yet: it is another job's, or an earlier one's of this name."""
        seen = id if id <= self._last_id else 0
        return [event for event in self._events if event.id > seen]

    async def follow(self, after: int, heartbeat: float) -> AsyncIterator[Event | None]:
        """Every event after `after` until the last, and None when `heartbeat` seconds passed
        without one. A reader that is slow misses only what the history drops."""
        while True:
            news = self._news
            events = self.after(after)
            for event in events:
                yield event
                after = event.id
            if events:
                continue
            if self.closed:
                return
            try:
                await asyncio.wait_for(news.wait(), heartbeat)
            except TimeoutError:
                yield None

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()
