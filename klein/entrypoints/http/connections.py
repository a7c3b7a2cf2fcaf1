"""Connections on which no request is under way: bounded in time, in bytes and in number.

uvicorn closes a connection that is idle between two requests; not one that never sends a request,
or sends its first lines byte by byte, and each of them is an open file.
"""

import asyncio
import socket
from typing import ClassVar
from weakref import WeakKeyDictionary

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

HEAD_SECONDS = 10.0
"""For a request's first line and headers, from the connection's beginning or the last answer."""
HEAD_BYTES = 65_536
"""Of a request's first line and headers."""
MAX_WAITING = 256
"""Connections without a request under way; the one that waits longest gives way to a new one."""
STALLED_SECONDS = 60
"""After which a caller who takes nothing of its answer is given up."""


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with these bounds: `uvicorn.Config(http=BoundedProtocol)`."""

    _waiting: ClassVar[WeakKeyDictionary[ServerState, dict["BoundedProtocol", None]]] = (
        WeakKeyDictionary()
    )
    _timer: asyncio.TimerHandle | None = None
    _in_head = False
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A caller is there, and has to say what it wants."""
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(
                socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_SECONDS * 1000
            )
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Some bytes; refuses a head that goes on and on."""
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES:
                self.send_400_response(f"the head of a request has at most {HEAD_BYTES} bytes")

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0

    def on_headers_complete(self) -> None:
        """The head of a request is there, which begins."""
        super().on_headers_complete()
        self._in_head = False
        self._stop_waiting()

    def on_response_complete(self) -> None:
        """An answer is out; whatever still comes of its request's body has to come soon."""
        super().on_response_complete()
        if self.cycle.response_complete:
            self._wait()

    def _wait(self) -> None:
        waiting = self._waiting.setdefault(self.server_state, {})
        waiting[self] = None
        self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)
        if len(waiting) > MAX_WAITING:
            oldest = next(iter(waiting))
            oldest._stop_waiting()
            oldest.transport.close()

    def _stop_waiting(self) -> None:
        self._waiting.get(self.server_state, {}).pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
