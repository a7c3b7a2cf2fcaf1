"""What a server does under pressure and at its end; real processes, without a model."""

import asyncio
import contextlib
import http.client
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import pytest

from tests.attacks import hostile
from tests.attacks.processes import Held, ask, serving, worker
from tests.support import live

REQUESTS = 1500
KEPT_BYTES = 1500
"""Of memory a request may cost for good; it was about 5,000."""
HOSTILE = 300
"""Hostile requests of the short form."""
ONE_STEP = {"prompt": "x", "num_inference_steps": 1}
SLOW = {"prompt": "x", "num_inference_steps": 10}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("served")) as (host, running, log):
        live.wait_for(f"http://{host}/readyz", 200, running, log)
        yield host


def test_unknown_paths_and_methods_have_kleins_shape(host: str) -> None:
    """Those that BentoML refuses too, which come to no route of klein's app."""
    for method, path, status, code in (
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/static_content/nothing", 404, "not_found"),
        ("GET", "/generate", 405, "invalid_request"),
        ("DELETE", "/presets", 405, "invalid_request"),
    ):
        answer = ask(host, method, path)
        assert (answer[0], answer[2]["error"]["code"]) == (status, code)


def test_hostile_requests(host: str) -> None:
    """Each is answered soon, none with a fault of klein's or with all that was sent."""
    address = host.split(":")
    faults = []

    async def attack() -> None:
        for request in islice(hostile.requests(seed=1), HOSTILE):
            reply = await hostile.send(address[0], int(address[1]), request, seconds=15)
            if fault := reply.fault():
                faults.append((request[:300], fault[:300]))

    asyncio.run(attack())
    assert not faults, faults[:5]


def test_a_refusal_is_seen_before_the_body_is_sent(host: str) -> None:
    """A closed connection would be reset under the caller's bytes, and the answer lost."""
    with socket.create_connection(("127.0.0.1", int(host.rpartition(":")[2]))) as caller:
        head = b"POST /generate HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
        caller.sendall(head + b"content-type: text/plain\r\ncontent-length: 3000000\r\n\r\n")
        for _ in range(30):
            caller.sendall(b"x" * 100_000)
            time.sleep(0.01)
        assert caller.recv(100).startswith(b"HTTP/1.1 400")


def test_requests_leave_nothing_in_memory(host: str) -> None:
    """No timer, no span, no task of any of them: measured on the cheapest route."""
    connection = http.client.HTTPConnection(host)

    def some() -> tuple[Held, int]:
        for _ in range(REQUESTS):
            connection.request("GET", "/ping")
            connection.getresponse().read()
        told = ask(host, "GET", "/worker")[2]
        time.sleep(0.5)  # the server, too, closes the connection of that question
        return Held.by(told["pid"]), told["tasks"]

    with contextlib.closing(connection):
        (before, tasks), (after, tasks_after) = some(), some()
    assert (after.mb - before.mb) * 1e6 < REQUESTS * KEPT_BYTES
    assert (after.files, after.threads, tasks_after) == (before.files, before.threads, tasks)


def test_connections_without_a_request_are_few(host: str) -> None:
    """BentoML's uvicorn is bounded too: a thousand of them, and a probe is answered."""
    port = int(host.rpartition(":")[2])
    callers = [socket.create_connection(("localhost", port)) for _ in range(900)]
    assert ask(host, "GET", "/livez")[0] == 200
    callers[0].settimeout(5)
    assert callers[0].recv(1) == b""
    for caller in callers:
        caller.close()


def test_draining(tmp_path: Path) -> None:
    """After SIGTERM who runs, waits or has a job is answered; new callers are refused at once."""
    with serving(tmp_path) as (host, running, log), ThreadPoolExecutor() as pool:
        live.wait_for(f"http://{host}/readyz", 200, running, log)
        assert ask(host, "POST", "/generate_json", ONE_STEP)[0] == 200
        known = http.client.HTTPConnection(host)
        known.request("GET", "/ping")
        known.getresponse().read()
        drawn = [pool.submit(ask, host, "POST", "/generate_json", SLOW) for _ in range(2)]
        time.sleep(0.5)
        job = ask(host, "POST", "/jobs", {"input": SLOW})[2]
        running.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        for method, path, body in (
            ("GET", "/readyz", None),
            ("GET", "/ping", None),
            ("GET", "/presets", None),
            ("POST", "/generate", ONE_STEP),
            ("POST", "/jobs", {"input": ONE_STEP}),
        ):
            started = time.monotonic()
            status, headers, told = ask(host, method, path, body)
            assert (status, told["error"]["code"]) == (503, "not_ready")
            assert (headers["connection"], bool(headers["retry-after"])) == ("close", True)
            assert time.monotonic() - started < 1
        with contextlib.closing(known):
            known.request("GET", "/presets")
            assert known.getresponse().status == 503
        assert ask(host, "GET", "/livez")[0] == 200
        events = pool.submit(ask, host, "GET", f"/jobs/{job['id']}/events")
        assert ask(host, "GET", f"/jobs/{job['id']}")[2]["status"] in ("starting", "processing")
        assert [each.result()[0] for each in drawn] == [200, 200]
        assert b"event: completed" in events.result()[2]
        assert running.wait(20) is not None


def test_sigterm_while_the_model_loads(tmp_path: Path) -> None:
    """Nothing is under way: there is nothing to wait for."""
    with serving(tmp_path, LOAD_SECONDS="100") as (host, running, log):
        live.wait_for(f"http://{host}/livez", 200, running, log)
        started = time.monotonic()
        running.send_signal(signal.SIGTERM)
        running.wait(30)
        assert time.monotonic() - started < 10


def test_a_worker_without_its_supervisor_ends(tmp_path: Path) -> None:
    """It would hold the port and the GPU, and nobody would know of it."""
    with serving(tmp_path) as (host, running, log):
        live.wait_for(f"http://{host}/readyz", 200, running, log)
        left = worker(running.pid)
        running.kill()
        running.wait()
        started = time.monotonic()
        while Path(f"/proc/{left}/cmdline").exists() and Path(f"/proc/{left}/cmdline").read_bytes():
            assert time.monotonic() - started < 10
            time.sleep(0.05)
        with socket.create_server(("127.0.0.1", int(host.rpartition(":")[2]))):
            pass
