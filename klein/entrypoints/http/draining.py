"""Between SIGTERM and the end of a server: who was let in is answered, others are refused at once.

A load balancer goes on sending requests until its next probe. uvicorn alone would leave them
waiting: it stops accepting, while BentoML holds the port until its worker is gone.
"""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from starlette.types import ASGIApp, Receive, Scope, Send

from klein.entrypoints.http.errors import error_response
from klein.errors import NotReady

PROBES = frozenset({"/livez", "/healthz", "/metrics"})
"""What is true to the last moment: a worker that drains must not be killed for it."""
JOBS = "/jobs/"
"""Below it are jobs that were accepted."""
LEAVE_SECONDS = 30.0
"""How long a server may take to end when nothing is under way any more."""
LOOK_SECONDS = 0.1


class Door:
    """Whether requests are let in, and how many of them are under way."""

    def __init__(self) -> None:
        self.closed = False
        self.under_way = 0


class GuardDoor:
    """ASGI middleware: while the door is closed, 503 for all but probes and accepted jobs."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self._app = app
        self._door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count the request while it lasts, or refuse it."""
        if scope["type"] != "http" or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        if self._door.closed and not _asks_for_a_job(scope):
            refusal = error_response(NotReady("klein is shutting down: try another worker"))
            refusal.headers["connection"] = "close"
            await refusal(scope, receive, send)
            return
        self._door.under_way += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._door.under_way -= 1


def _asks_for_a_job(scope: Scope) -> bool:
    return scope["path"].startswith(JOBS) and scope["method"] in ("GET", "POST")


def drain_on_sigterm(
    door: Door, jobs: Callable[[], int], loading: Callable[[], bool], *, seconds: float
) -> None:
    """From now on SIGTERM closes `door`, and ends the server as it did before once no request and
    none of the `jobs` is under way, or after `seconds`. A second SIGTERM does not wait. While the
    model is `loading` nothing is under way, and reading it cannot be stopped: the process ends.

    Does nothing where there is no such signal to be had: outside a process's main thread.
    """
    end = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or not callable(end):
        return
    loop = asyncio.get_running_loop()
    draining: set[asyncio.Task[None]] = set()

    async def drain() -> None:
        until = time.monotonic() + seconds
        while (door.under_way or jobs()) and time.monotonic() < until:  # noqa: ASYNC110 (jobs end in many places)
            await asyncio.sleep(LOOK_SECONDS)
        leave(signal.SIGTERM, None)

    def leave(number: int, frame: FrameType | None) -> None:
        last = threading.Timer(LEAVE_SECONDS, os._exit, [0])
        last.daemon = True
        last.start()
        end(number, frame)

    def on_sigterm(number: int, frame: FrameType | None) -> None:
        if loading():
            os._exit(0)
        if door.closed:
            leave(number, frame)
            return
        door.closed = True
        loop.call_soon_threadsafe(lambda: draining.add(loop.create_task(drain())))

    signal.signal(signal.SIGTERM, on_sigterm)
