"""Real processes for tests: klein's doors as a user starts them."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def environment(home: Path, **extra: str) -> dict[str, str]:
    """The environment of a newcomer: an empty home, the built-in model, no Hub."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("KLEIN_", "MODEL_"))}
    return kept | {
        "HOME": str(home),
        "BENTOML_HOME": str(home / "bentoml"),
        "BENTOML_DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "MODEL_ID": "nano",
        "PATH": f"{BIN}:{os.environ['PATH']}",
        **extra,
    }


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def status(url: str) -> int:
    """The HTTP status of a GET; 0 while nobody listens."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def post(url: str, body: object) -> tuple[int, bytes]:
    """The status and body of the answer to a POST of JSON."""
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@contextmanager
def process(argv: list[str], env: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run `argv` in the project's folder, its output in `log`; ended on leaving."""
    with log.open("wb") as out:
        running = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT)
    try:
        yield running
    finally:
        running.terminate()
        try:
            running.wait(30)
        except subprocess.TimeoutExpired:
            running.kill()


def wait_for(url: str, wanted: int, running: subprocess.Popen[bytes], log: Path) -> list[int]:
    """Every status seen until `wanted` came; fails with the log when the process ends."""
    seen = []
    for _ in range(1800):
        seen.append(status(url))
        if seen[-1] == wanted:
            return seen
        assert running.poll() is None, log.read_text()[-3000:]
        time.sleep(0.1)
    raise AssertionError(f"{url} never answered {wanted}:\n{log.read_text()[-3000:]}")
