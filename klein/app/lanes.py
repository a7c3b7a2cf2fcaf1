"""Threads for what is done beside drawing: a lane for each kind of work, so that no kind waits for
another's network or disk."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from klein.errors import DeadlineExceeded, DeliveryFailed, KleinError, LoraUnavailable

T = TypeVar("T")
Late = Callable[[], KleinError]


class Lane:
    """`threads` threads for one kind of work; `late` makes the error of what takes longer than
    `seconds`, waiting for a thread included."""

    def __init__(self, name: str, threads: int, seconds: float, late: Late) -> None:
        self._threads = ThreadPoolExecutor(threads, f"klein-{name}")
        self._seconds = seconds
        self._late = late

    async def run(self, work: Callable[[], T], seconds: float | None = None) -> T:
        """What `work` returns or raises. One that is late goes on in its thread, or never begins;
        `seconds` is another bound than the lane's own."""
        future = asyncio.get_running_loop().run_in_executor(self._threads, work)
        await asyncio.wait({future}, timeout=self._seconds if seconds is None else seconds)
        if not future.done():
            future.cancel()
            raise self._late()
        return await future

    def stop(self) -> None:
        """Take no more work; what has begun is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class Lanes:
    """The lanes of a process."""

    def __init__(self) -> None:
        self.encoding = Lane(
            "encode",
            4,
            60,
            partial(
                DeadlineExceeded, "the image is drawn, and encoding it took too long: try again"
            ),
        )
        self.delivery = Lane(
            "deliver",
            8,
            90,
            partial(DeliveryFailed, "the bucket took too long: try again, or ask for base64"),
        )
        self.files = Lane(
            "files",
            4,
            60,
            partial(LoraUnavailable, "the LoRAs are still being read: ask again in a minute"),
        )

    def stop(self) -> None:
        """Stop all of them."""
        for lane in (self.encoding, self.delivery, self.files):
            lane.stop()
