"""What the service costs: HTTP, queue and encoding over the bare pipeline call.

    python -m benchmarks.service            # nano on whatever is here
    python -m benchmarks.service --rounds 20 --steps 28

A real `bentoml serve` process and the same pipeline in this one take turns at the same prompts and
seeds; while one works the other idles. The pixels of both must be the same. The bare call ends with
a picture in memory, the service's with a PNG at the caller. The last line sets the caller's seconds
against those of the same picture inside the server, so that a clock that drifts does not matter.
"""

import argparse
import io
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from klein.app import build as startup
from klein.core import Job, RequestContext
from klein.output import response as render
from klein.output.marks import Marks
from klein.request.resolve import resolve
from klein.request.schema import parse
from klein.settings import Settings


@contextmanager
def service(model: str) -> Iterator[str]:
    """The address of a server of its own, ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    bento = Path(sys.executable).with_name("bentoml")
    argv = [str(bento), "serve", "service:Klein", "--port", str(port)]
    environ = os.environ | {"MODEL_ID": model, "PORT": str(port)}
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(argv, env=environ, stdout=log, stderr=subprocess.STDOUT) as running,
    ):
        try:
            wait_ready(f"http://127.0.0.1:{port}/readyz", running)
            yield f"http://127.0.0.1:{port}/generate"
        finally:
            running.terminate()


def wait_ready(url: str, running: Any) -> None:
    """Return when `url` answers 200; raises SystemExit if the server ends before that."""
    while running.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise SystemExit("the service did not start: try `make serve`")


def clock(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came of it."""
    started = time.perf_counter()
    made = work()
    return time.perf_counter() - started, made


def ask(url: str, body: dict[str, Any]) -> tuple[bytes, float]:
    """The PNG, and the seconds that the server took by its own clock."""
    data, kind = json.dumps(body).encode(), {"content-type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, data, kind)) as answer:
        return answer.read(), json.loads(answer.headers["x-klein-timings"])["total"]


def turn(pipe: Any, url: str, number: int, steps: int) -> dict[str, float]:
    """One picture both ways, in alternating order; seconds."""
    body = {"prompt": f"a portrait, number {number}", "seed": number, "num_inference_steps": steps}
    resolved = resolve(parse(body), pipe.info.spec, lambda: 0)
    ways: dict[str, Callable[[], Any]] = {
        "bare": lambda: pipe.generate(Job(RequestContext(math.inf), resolved.params)),
        "service": lambda: ask(url, body),
    }
    order = list(ways) if number % 2 else list(reversed(ways))
    done = {name: clock(ways[name]) for name in order}
    result, (png, inside) = done["bare"][1], done["service"][1]
    if Image.open(io.BytesIO(png)).tobytes() != result.images[0].image.tobytes():
        raise SystemExit("the service drew another picture: the two cannot be compared")
    encode = partial(render.encode, result, resolved.delivery, Marks())
    return {
        "bare call": done["bare"][0],
        "service": done["service"][0],
        "of it, the server's pipeline": inside,
        "of it, encoding (done here)": clock(encode)[0],
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=28)
    args = parser.parse_args()
    settings = Settings.from_env(os.environ | {"MODEL_ID": args.model})
    pipe = startup.loader(settings, os.environ)()
    with service(args.model) as url:
        turn(pipe, url, 0, args.steps)
        rows = [turn(pipe, url, number, args.steps) for number in range(1, args.rounds + 1)]
    print(f"{args.model}, {args.steps} steps, {pipe.info.speed} tier, median of {args.rounds}, ms")
    for name in rows[0]:
        values = [1000 * row[name] for row in rows]
        middle = statistics.median(values)
        print(f"{name:<30}{middle:9.1f}   {min(values):.1f} to {max(values):.1f}")
    inside = "of it, the server's pipeline"
    beside = statistics.median(row["service"] - row[inside] for row in rows)
    share = statistics.median(row["service"] / row[inside] - 1 for row in rows)
    print(f"beside its pipeline the service takes {1000 * beside:.1f} ms, {share:.2%}")


if __name__ == "__main__":
    main()
