"""The doors as real processes on the built-in model, and the pages' lines as printed."""

import base64
import http.client
import io
import json
import os
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from klein.output.images import read_text
from tests.support import docs, live, servers

JOB = json.loads((live.ROOT / "test_input.json").read_text())
QUICK = {"prompt": "a portrait", "seed": 1, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def url(home: Path) -> Iterator[str]:
    """`bentoml serve`, watched while it starts: alive at once, ready only when loaded."""
    port = live.free_port()
    url, log = f"http://localhost:{port}", home / "serve.log"
    argv = [str(live.BIN / "bentoml"), "serve", "service:Klein", "--port", str(port)]
    with live.process(argv, live.environment(home, PORT=str(port)), log) as running:
        live.wait_for(f"{url}/livez", 200, running, log)
        seen = live.wait_for(f"{url}/readyz", 200, running, log)
        assert 503 in seen
        assert f"is ready at {url}" in log.read_text()
        yield url


def _pixels(data: bytes) -> bytes:
    return Image.open(io.BytesIO(data)).convert("RGB").tobytes()


def test_the_same_request_gives_the_same_bytes(url: str) -> None:
    """A PNG with its parameters inside, twice."""
    first, second = (live.post(f"{url}/generate", QUICK) for _ in range(2))
    assert first == second
    assert first[0] == 200
    assert "Seed: 1" in read_text(first[1])


def test_compiled_kernels_are_counted(url: str) -> None:
    """None without a GPU; a counter that grows in service would show there."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    assert [line for line in lines if line.startswith("klein_kernels_compiled")] == [
        "klein_kernels_compiled 0.0"
    ]


def test_every_format_is_the_same_picture(url: str) -> None:
    """png is exact; jpeg and webp differ from it by their compression only."""
    _, exact = live.post(f"{url}/generate", QUICK)
    reference = Image.open(io.BytesIO(exact)).convert("RGB")
    for name in ("jpeg", "webp"):
        _, data = live.post(
            f"{url}/generate", {**QUICK, "output_format": name, "output_quality": 95}
        )
        other = Image.open(io.BytesIO(data)).convert("RGB")
        pairs = zip(reference.tobytes(), other.tobytes(), strict=True)
        off = sum(abs(a - b) for a, b in pairs) / len(reference.tobytes())
        assert off < 3


def test_hanging_up_cancels(url: str) -> None:
    """The GPU is free long before the job would have ended."""
    host = url.removeprefix("http://")
    connection = http.client.HTTPConnection(host)
    body = json.dumps({**QUICK, "num_inference_steps": 100, "width": 512, "height": 512})
    connection.request("POST", "/generate", body, {"content-type": "application/json"})
    _until(lambda: _queue(url)["running"])
    connection.close()
    started = time.monotonic()
    _until(lambda: not _queue(url)["running"])
    assert time.monotonic() - started < 5
    assert live.post(f"{url}/generate", QUICK)[0] == 200


def _queue(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/capabilities") as answer:
        queue: dict[str, Any] = json.load(answer)["queue"]
    return queue


def _until(condition: Any) -> None:
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it never came")


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_pages_lines_run_as_printed(url: str, home: Path, tmp_path: Path) -> None:
    """Every curl and command line in a `bash` block, but for `make` itself and the port."""
    (tmp_path / "test_input.json").write_text(json.dumps(JOB))
    (tmp_path / "docs").symlink_to(live.ROOT / "docs")
    script = "\n".join(docs.runnable("bash", docs.RUN_AS_PRINTED)).replace(
        "http://localhost:3000", url
    )
    script = script.replace("localhost:3000", url.removeprefix("http://"))
    lines = re.sub(r"^make .*$", "", script, flags=re.MULTILINE).replace(".venv/bin/", "")
    env = live.environment(home, PYTHONPATH=str(live.ROOT))
    run = subprocess.run(
        ["bash", "-euxc", lines], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    images = [p for p in tmp_path.iterdir() if p.suffix in (".png", ".webp", ".jpg")]
    assert len(images) >= 3
    for image in images:
        assert "Negative prompt" in read_text(image.read_bytes()), image
    assert lines.count("curl") >= 3
    assert lines.count("python -m klein") >= 4


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_pages_python_client_runs_as_printed(url: str, home: Path, tmp_path: Path) -> None:
    """The BentoML client gets a PIL image, and JSON."""
    for block in docs.runnable("python", docs.RUN_AS_PRINTED):
        code = block.replace("http://localhost:3000", url)
        env = live.environment(home)
        run = subprocess.run(
            ["python", "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr[-3000:]
    assert list(tmp_path.glob("*.png"))


def test_runpods_local_run_and_http_give_the_same_pixels(
    url: str, home: Path, tmp_path: Path
) -> None:
    """test_input.json through the SDK's API server, its --test_input, HTTP and the CLI."""
    _, answer = live.post(f"{url}/generate_json", JOB["input"])
    expected = _pixels(base64.b64decode(json.loads(answer)["images"][0]["base64"]))
    port, log = live.free_port(), tmp_path / "api.log"
    argv = ["python", "-m", "klein.runpod", "--rp_serve_api", "--rp_api_port", str(port)]
    with live.process(argv, live.environment(home), log) as running:
        live.wait_for(f"http://localhost:{port}/docs", 200, running, log)
        _, answer = live.post(f"http://localhost:{port}/runsync", JOB)
    done = json.loads(answer)
    assert done["status"] == "COMPLETED"
    assert _pixels(base64.b64decode(done["output"]["images"][0]["base64"])) == expected


@pytest.mark.long
def test_runpods_test_input(home: Path) -> None:
    """`--test_input "$(cat test_input.json)"` runs one job and exits with 0; a bad one with 1."""
    for text, code, says in (
        (json.dumps(JOB), 0, "base64"),
        ('{"input": {}}', 1, "Field required"),
    ):
        run = subprocess.run(
            ["python", "-m", "klein.runpod", "--test_input", text],
            cwd=live.ROOT,
            env=live.environment(home),
            capture_output=True,
            text=True,
        )
        assert run.returncode == code, run.stdout[-2000:] + run.stderr[-2000:]
        assert says in run.stdout + run.stderr
        assert "Traceback" not in run.stdout + run.stderr


def test_runpods_queue_against_a_loopback_platform(home: Path, tmp_path: Path) -> None:
    """Progress in order and before the result, errors as strings, cancel frees the GPU."""
    long = {**QUICK, "num_inference_steps": 100, "width": 512, "height": 512}
    jobs = [
        {"id": "good", "input": {**QUICK, "num_inference_steps": 60}},
        {"id": "bad", "input": {"prompt": "x", "steps": 3}},
        {"id": "long", "input": long},
        {"id": "last", "input": QUICK},
    ]
    platform = servers.RunpodPlatform(list(jobs), cancel="long")
    log = tmp_path / "worker.log"
    with servers.serve(platform) as server:
        argv = ["python", "-m", "klein.runpod"]
        with live.process(
            argv, live.environment(home, **servers.runpod_hooks(server)), log
        ) as running:
            _until_posted(platform, "last", running, log)
    by_job: dict[str, list[dict[str, Any]]] = {}
    for job_id, body in platform.posts:
        by_job.setdefault(job_id, []).append(body)
    *progress, result = by_job["good"]
    assert all(post["status"] == "IN_PROGRESS" for post in progress)
    steps = [post["output"]["step"] for post in progress]
    assert steps == sorted(steps)
    assert steps
    assert result["output"]["images"]
    assert by_job["bad"][-1]["error"].startswith("invalid_request: unknown field 'steps'")
    assert all(post.get("status") == "IN_PROGRESS" for post in by_job["long"])
    assert by_job["last"][-1]["output"]["images"][0]["seed"] == 1
    assert "Traceback" not in json.dumps(platform.posts)
    assert str(live.ROOT) not in json.dumps(platform.posts)


def _until_posted(
    platform: servers.RunpodPlatform, job_id: str, running: subprocess.Popen[bytes], log: Path
) -> None:
    for _ in range(900):
        if any(
            job == job_id and body.get("output", {}).get("images") for job, body in platform.posts
        ):
            return
        assert running.poll() is None, log.read_text()[-3000:]
        time.sleep(0.1)
    raise AssertionError(f"{job_id} never came:\n{platform.posts}\n{log.read_text()[-3000:]}")


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"MODEL_ID": "./nowhere"}, "there is no folder './nowhere'"),
        pytest.param(
            {"MODEL_ID": "klein-base-9B"}, "use MODEL_ID=nano to try klein", marks=pytest.mark.long
        ),
        ({"KLEIN_OFLOAD": "none"}, "did you mean 'KLEIN_OFFLOAD'"),
        pytest.param({"KLEIN_S3_BUCKET": "b"}, "the bucket is half set", marks=pytest.mark.long),
        pytest.param(
            {"KLEIN_WEBHOOK_SECRET": "x"},
            "KLEIN_WEBHOOK_SECRET: must be whsec_",
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_start_that_cannot_succeed_ends_with_one_sentence(
    home: Path, env: dict[str, str], says: str
) -> None:
    """`bentoml serve` stops, instead of restarting its worker for ever."""
    run = subprocess.run(
        ["bentoml", "serve", "service:Klein", "--port", str(live.free_port())],
        cwd=live.ROOT,
        env=live.environment(home, **env),
        capture_output=True,
        text=True,
        timeout=60,
    )
    printed = run.stdout + run.stderr
    assert run.returncode != 0
    assert f"klein cannot start: {'' if 'folder' not in says else 'MODEL_ID: '}" in printed
    assert says in printed
    assert "Traceback" not in printed


def test_ctrl_c_ends_the_command_line(home: Path, tmp_path: Path) -> None:
    """Exit code 130, no file left behind."""
    argv = ["python", "-m", "klein", "generate", "x", "-o", str(tmp_path / "a.png")]
    argv += ["--num-inference-steps", "100", "--width", "512", "--height", "512"]
    log = tmp_path / "log"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    with live.process(argv, live.environment(home), log) as running:
        _until(lambda: "drawing" in log.read_text() or running.poll() is not None)
        running.send_signal(2)
        assert running.wait(30) == 130
    assert not (tmp_path / "a.png").exists()
    assert os.path.exists(log)
