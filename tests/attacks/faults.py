"""What happens when klein is killed, stopped, or loses its disk or its bucket, on the built-in
model: `python -m tests.attacks.faults` prints figures, and raises where a promise breaks.

A small disk is a mounted tmpfs, which only root may do: for others the disk's faults are skipped.
"""

import json
import os
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any

from tests.attacks.processes import NANO, Held, ask, serving, worker
from tests.support import live, servers

IMAGE = {"prompt": "x", "width": 64, "height": 64, "num_inference_steps": 1}
LONG = {"prompt": "x", "width": 256, "height": 256, "num_inference_steps": 20}
FORM = b'--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n%s\r\n--b--\r\n'
JOBS = 1000
MORE_MB = 1.05
"""Memory after all jobs, in parts of that after the first tenth."""
Asked = list[Future[int]]


def status(host: str, body: Any) -> int:
    """Of the answer to a drawing; 0 for a connection that broke off."""
    try:
        return ask(host, "POST", "/generate_json", body)[0]
    except (OSError, HTTPException):
        return 0


def seconds_until(done: Callable[[], bool]) -> float:
    """Until it is; at most two minutes."""
    started = time.monotonic()
    while not done() and time.monotonic() - started < 120:
        time.sleep(0.05)
    return round(time.monotonic() - started, 2)


@contextmanager
def ready(home: Path, **env: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """klein on nano, ready."""
    with serving(home, NANO, **env) as (host, running, log):
        live.wait_for(f"http://{host}/readyz", 200, running, log)
        yield host, running


@contextmanager
def busy(host: str, pool: ThreadPoolExecutor) -> Iterator[tuple[Asked, str]]:
    """One drawing that runs and three that wait, and a job behind them."""
    asked = [pool.submit(status, host, LONG) for _ in range(4)]
    seconds_until(lambda: ask(host, "GET", "/capabilities")[2]["queue"]["waiting"] >= 3)
    yield asked, ask(host, "POST", "/jobs", {"input": IMAGE})[2]["id"]


def sigterm_while_busy(home: Path) -> dict[str, Any]:
    """Everybody who was let in is answered; everybody else is refused at once."""
    with (
        ready(home) as (host, running),
        ThreadPoolExecutor() as pool,
        busy(host, pool) as (asked, job),
    ):
        running.send_signal(signal.SIGTERM)
        refused = seconds_until(lambda: ask(host, "GET", "/readyz")[0] == 503)
        events = ask(host, "GET", f"/jobs/{job}/events")[2]
        answers = Counter(each.result() for each in asked)
        ended = seconds_until(lambda: running.poll() is not None)
    assert answers == {200: 4}, answers
    assert b"event: completed" in events
    assert refused < 1
    return {"answers": dict(answers), "job": "completed", "refused_after": refused, "ended": ended}


def sigterm_while_loading(home: Path) -> dict[str, Any]:
    """There is nothing to wait for."""
    with serving(home, NANO) as (host, running, log):
        live.wait_for(f"http://{host}/livez", 200, running, log)
        running.send_signal(signal.SIGTERM)
        ended = seconds_until(lambda: running.poll() is not None)
    assert ended < 10
    return {"ended": ended}


def killed(home: Path) -> dict[str, Any]:
    """Connections break off and jobs are forgotten, as said; the next worker comes by itself."""
    with (
        ready(home) as (host, running),
        ThreadPoolExecutor() as pool,
        busy(host, pool) as (asked, job),
    ):
        os.kill(worker(running.pid), signal.SIGKILL)
        answers = Counter(each.result() for each in asked)
        again = seconds_until(lambda: live.status(f"http://{host}/readyz") == 200)
        found = ask(host, "GET", f"/jobs/{job}")[0]
        drawn = status(host, IMAGE)
    assert (answers, found, drawn) == ({0: 4}, 404, 200)
    return {"broken_off": answers[0], "job": found, "ready_again": again, "drawn": drawn}


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    """A megabyte mounted at `folder`."""
    folder.mkdir()
    argv = ["/bin/mount", "-t", "tmpfs", "-o", f"size=1m,{options}", "tmpfs", str(folder)]
    subprocess.run(argv, check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["/bin/umount", str(folder)], check=True)


def disk(home: Path, options: str) -> dict[str, Any]:
    """No room for a LoRA, neither in its folder nor where uploads are kept for the moment: the
    server's fault, and for no image."""
    with small_disk(home / "disk", options) as small:
        folders = {"KLEIN_LORA_DIR": str(small), "TMPDIR": str(small)}
        settings = {"KLEIN_LORA_UPLOADS": "on", "KLEIN_LORA_CACHE": str(small / "cache")}
        with ready(home, **folders, **settings) as (host, _):
            data = b"x" * 3_000_000
            form = FORM % data
            codes = []
            for body, kind in (
                (data, "application/octet-stream"),
                (form, "multipart/form-data; boundary=b"),
            ):
                told = ask(host, "POST", "/loras?name=a.safetensors", body, kind)
                codes.append((told[0], told[2]["error"]["code"], told[2]["error"]["retryable"]))
            drawn = ask(
                host, "POST", "/generate_json", IMAGE | {"loras": [{"path": "a.safetensors"}]}
            )
            left = sum(each.stat().st_size for each in small.rglob("*") if each.is_file())
    assert codes == [(503, "lora_unavailable", True)] * 2, codes
    assert (drawn[0], drawn[2]["loras"][0]["applied"], left) == (200, False, 0)
    return {"uploads": codes, "drawn": drawn[0], "bytes_left": left}


def full_disk(home: Path) -> dict[str, Any]:
    """One of a megabyte."""
    return disk(home, "rw")


def read_only_disk(home: Path) -> dict[str, Any]:
    """One that nothing can be written to."""
    return disk(home, "ro")


def bucket_that_refuses(home: Path) -> dict[str, Any]:
    """Its links are a named, retryable error; images that need none are drawn."""
    with servers.serve(lambda _: (503, {}, b"")) as bucket:
        settings = {"ENDPOINT": bucket.url, "BUCKET": "b", "KEY_ID": "k", "SECRET": "s"}
        with ready(home, **{f"KLEIN_S3_{name}": value for name, value in settings.items()}) as (
            host,
            _,
        ):
            told = ask(host, "POST", "/generate_json", IMAGE | {"return_type": "url"})
            drawn = status(host, IMAGE)
    error = told[2]["error"]
    assert (told[0], error["code"], error["retryable"], drawn) == (
        502,
        "delivery_failed",
        True,
        200,
    )
    return {"links": told[0], "drawn": drawn}


def a_thousand_jobs(home: Path) -> dict[str, Any]:
    """They leave no thread, no file and no memory behind."""
    settings = {"KLEIN_JOBS_KEEP_SECONDS": "5", "KLEIN_JOBS_KEEP_MB": "1"}
    with ready(home, **settings) as (host, running), ThreadPoolExecutor(4) as pool:

        def job(_: int) -> bool:
            id = ask(host, "POST", "/jobs", {"input": IMAGE})[2]["id"]
            return b"event: completed" in ask(host, "GET", f"/jobs/{id}/events")[2]

        def some(count: int) -> Held:
            assert all(pool.map(job, range(count)))
            time.sleep(6)
            return Held.by(worker(running.pid))

        first, last = some(JOBS // 10), some(JOBS)
    assert last.mb < MORE_MB * first.mb
    assert (last.threads, last.files) <= (first.threads + 2, first.files + 2)
    return {"after_100": vars(first), "after_1100": vars(last)}


def main() -> None:
    """Each fault on a server of its own."""
    for fault in (
        sigterm_while_busy, sigterm_while_loading, killed, full_disk, read_only_disk,
        bucket_that_refuses, a_thousand_jobs,
    ):  # fmt: skip
        with tempfile.TemporaryDirectory() as home:
            try:
                figures = json.dumps(fault(Path(home)))
            except subprocess.CalledProcessError:
                figures = "skipped: a disk cannot be mounted here"
            print(f"{fault.__name__}: {figures}", flush=True)


if __name__ == "__main__":
    main()
