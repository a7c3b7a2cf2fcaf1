"""klein as processes, and what they hold, seen from outside."""

import http.client
import json
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import live

FAKE = "tests.attacks.served:Klein"
NANO = "service:Klein"
Running = tuple[str, subprocess.Popen[bytes], Path]


@contextmanager
def serving(home: Path, service: str = FAKE, **env: str) -> Iterator[Running]:
    """`bentoml serve`: its host and port, its supervisor and its log."""
    port, log = live.free_port(), home / "serve.log"
    argv = [str(live.BIN / "bentoml"), "serve", service, "--port", str(port)]
    with live.process(argv, live.environment(home, **env), log) as running:
        yield f"127.0.0.1:{port}", running, log


def ask(
    host: str, method: str, path: str, body: Any = None, kind: str = "application/json"
) -> tuple[int, dict[str, str], Any]:
    """Status, headers and content of an answer on a connection of its own; JSON both ways, but for
    a body that is bytes."""
    with closing(http.client.HTTPConnection(host, timeout=90)) as connection:
        data = body if isinstance(body, bytes | None) else json.dumps(body)
        connection.request(method, path, data, {"content-type": kind} if data else {})
        answer = connection.getresponse()
        text = answer.read()
    json_there = "json" in answer.headers.get("content-type", "")
    return answer.status, dict(answer.headers.items()), json.loads(text) if json_there else text


def worker(supervisor: int) -> int:
    """The process that BentoML's supervisor runs the service in; 0 while there is none."""
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
            command = entry.with_name("cmdline").read_text()
        except OSError:
            continue
        if parent == supervisor and "_bentoml_impl.worker" in command:
            return int(entry.parent.name)
    return 0


@dataclass(frozen=True)
class Held:
    """What a process holds: megabytes of memory, threads, open files."""

    mb: float
    threads: int
    files: int

    @classmethod
    def by(cls, pid: int) -> "Held":
        """What the process `pid` holds now."""
        proc = Path(f"/proc/{pid}")
        pages = int((proc / "statm").read_text().split()[1])
        return cls(
            round(pages * 4096 / 1e6, 1),
            len(list((proc / "task").iterdir())),
            len(list((proc / "fd").iterdir())),
        )
