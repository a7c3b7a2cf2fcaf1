"""Callers who open connections and send no request, or no end of it; on a real port."""

import socket
import time
from collections.abc import Iterator

import pytest
from starlette.types import Receive, Scope, Send

from klein.entrypoints.http import connections
from tests.support import asgi

HEAD = b"GET / HTTP/1.1\r\nhost: x\r\n"
BIG = 30_000_000


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with a few bytes, or with many for /big."""
    if scope["type"] != "http":
        return
    body = b"x" * (BIG if scope["path"] == "/big" else 2)
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.5)
    monkeypatch.setattr(connections, "MAX_WAITING", 20)
    monkeypatch.setattr(connections, "STALLED_SECONDS", 1)
    with asgi.serve(app) as url:
        yield "127.0.0.1", int(url.rpartition(":")[2])


def is_closed(caller: socket.socket, within: float) -> bool:
    """Whether the server ends the connection; what it sends before is dropped."""
    caller.settimeout(within)
    try:
        while caller.recv(65_536):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def drip(caller: socket.socket, data: bytes, pause: float = 0.05) -> float:
    """Send byte by byte until the server ends it; the seconds that took."""
    started = time.monotonic()
    try:
        for byte in data:
            caller.send(bytes([byte]))
            time.sleep(pause)
    except OSError:
        pass
    return time.monotonic() - started


def test_who_sends_nothing_is_closed(address: tuple[str, int]) -> None:
    """After the time that a head may take."""
    with socket.create_connection(address) as caller:
        assert not is_closed(caller, 0.2)
        assert is_closed(caller, 2)


@pytest.mark.parametrize("before", [b"", HEAD + b"\r\n"])
def test_a_head_that_drips_is_given_up(address: tuple[str, int], before: bytes) -> None:
    """The first of a connection, and one after a request that was answered."""
    with socket.create_connection(address) as caller:
        caller.sendall(before)
        assert drip(caller, HEAD * 10) < 2


def test_a_body_that_drips_after_its_answer_is_given_up(address: tuple[str, int]) -> None:
    """The answer did not wait for it; the connection does not either."""
    with socket.create_connection(address) as caller:
        caller.sendall(HEAD + b"content-length: 1000\r\n\r\n")
        assert drip(caller, b"x" * 200) < 2


@pytest.mark.parametrize("head", [b"GET /" + b"x" * 200_000, HEAD + b"x: " + b"y" * 200_000])
def test_a_head_without_end_is_refused(address: tuple[str, int], head: bytes) -> None:
    """However fast it comes."""
    with socket.create_connection(address) as caller:
        caller.settimeout(0.4)
        caller.sendall(head)
        assert caller.recv(100).startswith(b"HTTP/1.1 400")


def test_the_longest_wait_gives_way(address: tuple[str, int]) -> None:
    """Files are left for who asks something, whoever opens connections."""
    callers = [socket.create_connection(address) for _ in range(25)]
    with socket.create_connection(address) as newest:
        newest.sendall(HEAD + b"\r\n")
        newest.settimeout(0.3)
        assert newest.recv(100).startswith(b"HTTP/1.1 200")
    assert [is_closed(caller, 0.05) for caller in callers[:4]] == [True] * 4
    assert not is_closed(callers[-1], 0.05)
    for caller in callers:
        caller.close()


def test_who_takes_nothing_of_an_answer_is_given_up(address: tuple[str, int]) -> None:
    """It would hold the connection, and the bytes of its image, for ever."""
    with socket.socket() as caller:
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 10_000)
        caller.connect(address)
        caller.sendall(HEAD.replace(b"/ ", b"/big ") + b"\r\n")
        time.sleep(4)
        caller.settimeout(2)
        got = 0
        try:
            while part := caller.recv(1_000_000):
                got += len(part)
        except OSError:
            pass
        assert got < BIG / 2


def test_a_slow_reader_gets_all_of_its_answer(address: tuple[str, int]) -> None:
    """Longer than a head may take, as long as it goes on."""
    with socket.socket() as caller:
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1_000_000)
        caller.connect(address)
        caller.sendall(HEAD.replace(b"/ ", b"/big ") + b"connection: close\r\n\r\n")
        got, started = 0, time.monotonic()
        while part := caller.recv(BIG // 40):
            got += len(part)
            time.sleep(0.02)
        assert got > BIG
        assert time.monotonic() - started > 0.6
