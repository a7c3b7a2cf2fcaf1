"""Between SIGTERM and the end of a server: who was let in is answered, others are refused at once.

A load balancer goes on sending requests until its next probe. uvicorn alone would leave them
waiting: it stops accepting, while BentoML holds the port until its worker is gone.
"""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any

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
SUPERVISOR_SECONDS = 1.0
"""Between two looks at whether the process that started this one is still there."""


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


class Draining:
    """What SIGTERM does: it closes `door`, and ends the server as it did before once no request and
    none of the `jobs` is under way, or after `seconds`. A second SIGTERM does not wait.

    While the model is `loading` nothing is under way, and reading it cannot be stopped: the process
    ends at once. When the process that started this one is gone, it is as if SIGTERM had come.
    """

    def __init__(
        self, door: Door, jobs: Callable[[], int], loading: Callable[[], bool], seconds: float
    ) -> None:
        self._door = door
        self._jobs = jobs
        self._loading = loading
        self._seconds = seconds
        self._tasks: set[asyncio.Task[None]] = set()  # the loop itself holds them only weakly

    def install(self) -> None:
        """From now on, in the running loop; does nothing outside a process's main thread, where
        there are no signals to be had."""
        before = signal.getsignal(signal.SIGTERM)
        if threading.current_thread() is not threading.main_thread() or not callable(before):
            return
        self._end = before
        self._loop = asyncio.get_running_loop()
        signal.signal(signal.SIGTERM, self._on_sigterm)
        self._start(self._follow_supervisor(os.getppid()))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.add(self._loop.create_task(work))

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        if self._loading():
            os._exit(0)
        if self._door.closed:
            self._leave()
            return
        self._door.closed = True
        self._loop.call_soon_threadsafe(lambda: self._start(self._drain()))

    async def _drain(self) -> None:
        until = time.monotonic() + self._seconds
        while (self._door.under_way or self._jobs()) and time.monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(LOOK_SECONDS)
        self._leave()

    def _leave(self) -> None:
        last = threading.Timer(LEAVE_SECONDS, os._exit, [0])
        last.daemon = True
        last.start()
        self._end(signal.SIGTERM, None)

    async def _follow_supervisor(self, pid: int) -> None:
        while os.getppid() == pid:  # noqa: ASYNC110
            await asyncio.sleep(SUPERVISOR_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)
