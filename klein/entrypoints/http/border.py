"""What stands around BentoML's own middlewares: a line of the log for each request, bounded labels
for what they count by path, and headers that they can read."""

import logging
import time
from collections.abc import Iterable
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("klein.access")

UNKNOWN = "/{unknown}"
"""The label of every path that is no route's."""
PROBES = ("/livez", "/readyz", "/healthz", "/metrics")
"""What is asked every few seconds and not logged."""
LOGGED_PATH = 300
"""Characters."""
REQUEST_IDS = ("x-klein-request-id", "x-request-id")
REAL_PATH = "klein.path"


class Border:
    """ASGI middleware around everything: logs the answer, and shows who is inside the route in
    place of the path, until `RealPaths` puts the path back.

    BentoML counts requests by path, and each new one would be kept for ever. Header values that are
    not UTF-8, which its log and its tracing fail on, are read as Latin-1.
    """

    def __init__(self, app: ASGIApp, routes: Iterable[str]) -> None:
        """`routes` are the paths of all routes, such as `/jobs/{id}`."""
        self._app = app
        self._routes = [(path, compile_path(path)[0]) for path in routes]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let it through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, answer = time.perf_counter(), _Answer()

        async def watched(message: Message) -> None:
            answer.see(message)
            await send(message)

        path = scope["path"]
        inner = {**scope, "path": self._route(path), REAL_PATH: path, "headers": _readable(scope)}
        try:
            await self._app(inner, receive, watched)
        finally:
            if path not in PROBES:
                answer.log(scope, time.perf_counter() - started)

    def _route(self, path: str) -> str:
        return next((route for route, regex in self._routes if regex.match(path)), UNKNOWN)


class RealPaths:
    """ASGI middleware inside BentoML's own: the path as it was asked."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let it through."""
        if REAL_PATH in scope:
            scope = {**scope, "path": scope[REAL_PATH]}
        await self._app(scope, receive, send)


class _Answer:
    """What is logged of an answer; status 0 is that of a connection that ended without one."""

    def __init__(self) -> None:
        self._status = 0
        self._id = ""

    def see(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = Headers(raw=message["headers"])
            self._id = next((headers[name] for name in REQUEST_IDS if name in headers), "")

    def log(self, scope: Scope, seconds: float) -> None:
        method, path = scope["method"], quote(scope["path"])[:LOGGED_PATH]
        told = {"method": method, "path": path, "status": self._status, "seconds": seconds}
        extra = {"fields": told | ({"request_id": self._id} if self._id else {})}
        log.info("%s %s %s in %.3f s", method, path, self._status, seconds, extra=extra)


def _readable(scope: Scope) -> list[tuple[bytes, bytes]]:
    return [(name, _utf8(value)) for name, value in scope["headers"]]


def _utf8(value: bytes) -> bytes:
    try:
        value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1").encode()
    return value
