"""Connections that end in time, stop when asked to and reach nothing inside the operator's network.

It lies below the HTTP library: whatever a server sends, or does not send, every wait is cut into
short ones, and between them the deadline and the caller's wish are looked at. Every host is looked
up once, checked, and connected to by the address that was checked, so that a name cannot change
its meaning between the check and the use.
"""

import functools
import queue
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import httpcore

from klein.sources.address import is_public

T = TypeVar("T")

PAUSE = 0.2
"""Seconds of a single wait; a cancelled fetch ends within one."""
SILENCE = 30.0
"""Seconds without a byte after which a server is given up."""
CONNECT = 15.0
"""Seconds for one address to take a connection."""
MAX_HEAD_BYTES = 256 * 1024
"""Of everything before an answer's body: headers, and however many 1xx answers."""

OnBytes = Callable[[int, int | None], None]
"""Called with bytes so far and in all (None where the server does not say); may raise to stop."""


class FetchFailed(Exception):
    """One sentence on why nothing was fetched; it names the host, never the whole address.

    `retryable` is for faults of the network or the disk, which may be gone the next time.
    """

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable


def ignore_bytes(_: int, __: int | None) -> None:
    """For callers that do not watch."""


def go_on() -> None:
    """For callers that never stop a fetch."""


@dataclass(frozen=True, slots=True)
class Watch:
    """Who waits for a fetch: until when (on the clock of time.monotonic), what raises to stop it,
    and who hears of its bytes."""

    deadline: float = float("inf")
    check: Callable[[], None] = go_on
    on_bytes: OnBytes = ignore_bytes

    @property
    def is_over(self) -> bool:
        """Whether whoever waits has left."""
        try:
            self.check()
        except Exception:
            return True
        return time.monotonic() >= self.deadline

    def wait(self, event: threading.Event, what: str) -> None:
        """Wait for `event`; raises what `check` does, or FetchFailed at the deadline."""
        while not event.wait(PAUSE):
            self.check()
            if time.monotonic() >= self.deadline:
                raise FetchFailed(f"{what} took too long", retryable=True)


UNWATCHED = Watch()
"""Of a caller who waits as long as it takes."""


class Bounds:
    """What one whole exchange may take: the time for resolving, connecting and every byte, and
    the bytes before each answer's body."""

    def __init__(self, watch: Watch, seconds: float) -> None:
        self._watch = watch
        self._ends = min(watch.deadline, time.monotonic() + seconds)
        self._head_left: int | None = None

    def expect_head(self) -> None:
        """Count what comes, until the body begins."""
        self._head_left = MAX_HEAD_BYTES

    def expect_body(self) -> None:
        """From here on whoever reads counts the bytes."""
        self._head_left = None

    def count(self, size: int, host: str) -> None:
        """Note received bytes; raises FetchFailed for a head without end."""
        if self._head_left is not None:
            self._head_left -= size
            if self._head_left < 0:
                raise FetchFailed(f"{host} sends headers without end")

    def pause(self, until: float, what: str) -> float:
        """Seconds the next wait may take; raises when the exchange, or `until`, is over."""
        self._watch.check()
        now = time.monotonic()
        if now >= self._ends:
            raise FetchFailed(f"{what} took too long", retryable=True)
        if now >= until:
            raise FetchFailed(f"{what} does not answer", retryable=True)
        return min(PAUSE, self._ends - now, until - now)


class GuardedNetwork(httpcore.NetworkBackend):
    """Connects to public addresses only, and to hosts in `own_hosts`, within `bounds`."""

    def __init__(self, own_hosts: Iterable[str], bounds: Bounds) -> None:
        self._own_hosts = frozenset(own_hosts)
        self._bounds = bounds

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Any = None,
    ) -> httpcore.NetworkStream:
        """A connection to the first address of `host` that takes one."""
        found = self._resolve(host, port)
        if not {host, f"{host}:{port}"} & self._own_hosts and not all(
            is_public(str(place[0])) for _, place in found
        ):
            raise FetchFailed(
                f"{host} is inside this network and is not asked; "
                "name it in KLEIN_FETCH_HOSTS if it is yours"
            )
        for family, place in found[:-1]:
            try:
                return _Stream(self._connect(host, family, place), host, self._bounds)
            except (OSError, FetchFailed):
                continue
        family, place = found[-1]
        return _Stream(self._connect(host, family, place), host, self._bounds)

    def _resolve(self, host: str, port: int) -> list[tuple[int, Any]]:
        """(family, address) of a host, looked up in a thread of its own: that cannot be stopped."""
        answer: queue.SimpleQueue[list[Any] | Exception] = queue.SimpleQueue()

        def look_up() -> None:
            try:
                answer.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
            except (OSError, UnicodeError) as error:
                answer.put(error)

        threading.Thread(target=look_up, name="klein-resolve", daemon=True).start()
        until = time.monotonic() + CONNECT
        while True:
            pause = self._bounds.pause(until, f"looking up {host}")
            try:
                found = answer.get(timeout=pause)
                break
            except queue.Empty:
                continue
        if isinstance(found, Exception) or not found:
            raise FetchFailed(f"{host} has no address", retryable=True)
        return [(entry[0], entry[4]) for entry in found]

    def _connect(self, host: str, family: int, place: Any) -> socket.socket:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.connect_ex(place)
            until = time.monotonic() + CONNECT
            with selectors.DefaultSelector() as selector:
                selector.register(sock, selectors.EVENT_WRITE)
                while not selector.select(self._bounds.pause(until, host)):
                    continue
            if code := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise httpcore.ConnectError(f"error {code}")
        except BaseException:
            sock.close()
            raise
        return sock


class _Stream(httpcore.NetworkStream):
    """A connection whose every operation is cut into short waits."""

    def __init__(self, sock: socket.socket, host: str, bounds: Bounds) -> None:
        self._sock = sock
        self._host = host
        self._bounds = bounds

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """At least one byte, or none at the end."""
        data = self._patiently(lambda: self._sock.recv(max_bytes), httpcore.ReadError)
        self._bounds.count(len(data), self._host)
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """All of `buffer`."""
        rest = memoryview(buffer)
        while rest:
            send = functools.partial(self._sock.send, rest)
            rest = rest[self._patiently(send, httpcore.WriteError) :]

    def close(self) -> None:
        """Hang up."""
        self._sock.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        """The same connection under TLS."""
        stream: httpcore.NetworkStream = self
        try:
            secure = ssl_context.wrap_socket(
                self._sock, server_hostname=server_hostname, do_handshake_on_connect=False
            )
            stream = tried = _Stream(secure, self._host, self._bounds)
            tried._patiently(secure.do_handshake, httpcore.ConnectError)
        except BaseException:
            stream.close()
            raise
        return stream

    def get_extra_info(self, info: str) -> Any:
        """What httpcore asks of a connection."""
        if info == "ssl_object":
            return self._sock if isinstance(self._sock, ssl.SSLSocket) else None
        return None

    def _patiently(self, operation: Callable[[], T], fault: type[Exception]) -> T:
        until = time.monotonic() + SILENCE
        while True:
            self._sock.settimeout(self._bounds.pause(until, self._host))
            try:
                return operation()
            except TimeoutError:
                continue
            except ssl.SSLCertVerificationError as error:
                raise FetchFailed(f"{self._host} shows no valid certificate") from error
            except OSError as error:
                raise fault(type(error).__name__) from error


@functools.cache
def tls() -> ssl.SSLContext:
    """What servers are checked with."""
    return httpcore.default_ssl_context()
