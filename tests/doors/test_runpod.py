import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from klein.app.generator import Generator
from klein.entrypoints import runpod
from klein.entrypoints.runpod import Worker
from klein.errors import LoraError, OutOfMemory
from tests.support import fakes, live


class Platform:
    """Notes what a worker sends it, and when."""

    def __init__(self, delay: float = 0.0) -> None:
        self.delay = delay
        self.updates: list[dict[str, Any]] = []
        self.finished = 0

    async def send(self, job: dict[str, Any], update: dict[str, Any]) -> None:
        self.updates.append(update)
        await asyncio.sleep(self.delay)
        self.finished += 1


class SlowSteps(fakes.FakePipeline):
    """Takes a moment for every step."""

    def generate(self, job: Any) -> Any:
        heard = job.context.on_progress

        def slowly(progress: Any) -> None:
            time.sleep(0.01)
            heard(progress)

        return super().generate(replace(job, context=replace(job.context, on_progress=slowly)))


@pytest.fixture
def fake() -> fakes.FakePipeline:
    return fakes.FakePipeline()


@pytest.fixture
def generator(fake: fakes.FakePipeline) -> Iterator[Generator]:
    made = fakes.generator(fake, KLEIN_QUEUE_SIZE="2")
    yield made
    fake.gate.set()
    made.stop()


def _worker(generator: Generator, platform: Platform | None = None) -> Worker:
    return Worker(generator, (platform or Platform()).send)


def _handle(worker: Worker, given: Any, id: str = "job-1") -> dict[str, Any]:
    return asyncio.run(worker.handle({"id": id, "input": given, "s3Config": {"secret": "s"}}))


def test_a_job_is_answered_like_generate_json(generator: Generator) -> None:
    """The job's own id, strict JSON, no error key."""
    answer = _handle(_worker(generator), {"prompt": "x", "seed": 4, "preset": "portrait_hd"})
    assert answer["id"] == "job-1"
    assert answer["parameters"]["height"] == 384
    assert answer["images"][0]["seed"] == 4
    assert "error" not in answer
    json.dumps(answer, allow_nan=False)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (None, "invalid_request: input: send an object"),
        ("text", "invalid_request: input: send an object"),
        ({}, "invalid_request: prompt: Field required"),
        ({"prompt": "x", "steps": 1}, "did you mean 'num_inference_steps'"),
        ({"prompt": "x", "width": 10}, "invalid_request: width: 10×256 is too small"),
        ({"prompt": "x", "return_type": "url"}, "KLEIN_S3_ENDPOINT"),
        ({"prompt": "x", "preset": "y" * 6_000_000}, "unknown preset 'yyy"),
        ({"prompt": "x", "y" * 6_000_000: 1}, "unknown field 'yyy"),
        ({"prompt": "x", "progress": "y" * 6_000_000}, "progress: must be 'steps'"),
        ({"prompt": "x" * 6_000_000}, "at most 5000 characters"),
        ({"prompt": "x", "images": ["y" * 6_000_001]}, "images.0: neither an https address"),
        ({"prompt": "x", "extend": {"y" * 6_000_000: 1}}, "unknown field 'yyy"),
    ],
)
def test_errors_are_strings_that_begin_with_their_code(
    generator: Generator, given: Any, error: str
) -> None:
    """RunPod drops an `error` that is anything else."""
    answer = _handle(_worker(generator), given)
    assert isinstance(answer["error"], str)
    assert len(json.dumps(answer)) < 3000
    assert error in answer["error"]
    assert answer["code"] == "invalid_request"
    assert answer["retryable"] is False


def test_nothing_of_an_unknown_error_leaves(generator: Generator, fake: fakes.FakePipeline) -> None:
    """No traceback, no path, no secret of the job."""
    fake.fail = RuntimeError("/root/klein/secret.py broke")
    answer = _handle(_worker(generator), {"prompt": "x"})
    assert answer["error"].startswith("internal: ")
    assert "secret" not in json.dumps(answer)


def test_an_unhealthy_worker_asks_to_be_replaced(
    generator: Generator, fake: fakes.FakePipeline
) -> None:
    """Beside the error, and beside that of every job that still comes; no other error does."""
    worker = _worker(generator)
    fake.fail = LoraError("gone")
    assert "refresh_worker" not in _handle(worker, {"prompt": "x"})
    fake.fail = OutOfMemory("too big")
    answer = _handle(worker, {"prompt": "x"})
    assert (answer["error"], answer["refresh_worker"]) == ("out_of_memory: too big", True)
    answer = _handle(worker, {"prompt": "x"})
    assert answer["error"].startswith("not_ready: this worker ran out of GPU memory twice")
    assert (answer["retryable"], answer["refresh_worker"]) == (True, True)


def test_progress_is_throttled_in_order_and_drained(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No post is under way when the result is returned."""
    monkeypatch.setattr(runpod, "PROGRESS_EVERY", 0.02)
    platform = Platform(delay=0.05)
    steps: list[int] = []

    class Slow(fakes.FakePipeline):
        def generate(self, job: Any) -> Any:
            time.sleep(0.1)
            return super().generate(job)

    slow = fakes.generator(Slow())
    answer = _handle(_worker(slow, platform), {"prompt": "x", "num_inference_steps": 100})
    slow.stop()
    assert answer["images"]
    assert platform.finished == len(platform.updates) >= 1
    steps = [update["step"] for update in platform.updates]
    assert steps == sorted(steps)
    assert len(steps) < 100


def test_progress_that_cannot_be_delivered_costs_nothing(generator: Generator) -> None:
    """A job must not fail for a courtesy."""

    class Broken(Platform):
        async def send(self, job: dict[str, Any], update: dict[str, Any]) -> None:
            raise ConnectionError

    assert _handle(_worker(generator, Broken()), {"prompt": "x"})["images"]


def test_progress_can_carry_previews(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """As small JPEGs, only where they are asked for, each sent once."""
    monkeypatch.setattr(runpod, "PROGRESS_EVERY", 0.01)
    for asked in ("steps", "previews"):
        platform = Platform(delay=0.02)
        slow = fakes.generator(SlowSteps())
        given = {"prompt": "x", "num_inference_steps": 40, "progress": asked}
        assert _handle(_worker(slow, platform), given)["images"]
        slow.stop()
        seen = [update["preview"] for update in platform.updates if "preview" in update]
        assert bool(seen) is (asked == "previews")
        assert len(set(seen)) == len(seen)
        assert all(each.startswith("data:image/jpeg;base64,") for each in seen)
    answer = _handle(_worker(generator), {"prompt": "x", "progress": "films"})
    assert "progress: must be" in answer["error"]


def test_a_platform_that_hangs_withholds_nothing(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image is finished; a post of progress that never ends is given up."""
    monkeypatch.setattr(runpod, "POST_SECONDS", 0.2)
    started = time.monotonic()
    assert _handle(_worker(generator, Platform(delay=60)), {"prompt": "x"})["images"]
    assert time.monotonic() - started < 5


def test_cancel_frees_the_gpu_before_the_next_job(
    generator: Generator, fake: fakes.FakePipeline
) -> None:
    """The SDK cancels the handler's task; two denoising loops must never overlap."""
    fake.gate.clear()
    worker = _worker(generator)

    async def scenario() -> None:
        task = asyncio.create_task(worker.handle({"id": "a", "input": {"prompt": "x"}}))
        await asyncio.to_thread(fake.started.wait, 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not generator.engine.stats().running
        fake.gate.set()
        assert (await worker.handle({"id": "b", "input": {"prompt": "y"}}))["images"]

    asyncio.run(scenario())
    assert fake.drawn == ["y"]


def test_large_results_arrive_smaller(generator: Generator, fake: fakes.FakePipeline) -> None:
    """RunPod loses results over its limit; here they shrink and say so."""
    fake.noise = True
    small = fakes.generator(fake, KLEIN_MAX_RESPONSE_MB="0.9")
    answer = _handle(_worker(small), {"prompt": "x", "width": 512, "height": 512})
    assert answer["images"][0]["mime_type"] == "image/webp"
    assert any("over the limit" in warning for warning in answer["warnings"])
    assert len(json.dumps(answer)) < 0.9e6
    small.stop()


def test_ids_are_made_safe(generator: Generator) -> None:
    """They go into bucket keys and logs."""
    answer = _handle(_worker(generator), {"prompt": "x"}, id="../../etc/x y")
    assert answer["id"] == "______etc_x_y"


LOADING = """
import time
from klein.app import build
from klein.entrypoints import runpod

def load():
    print("loading", flush=True)
    time.sleep(60)

build.loader = lambda settings, environ: load
runpod.main()
"""


def test_sigterm_while_the_model_loads(tmp_path: Path) -> None:
    """It ends at once, by a handler: the first process of a container has no default one."""
    env = live.environment(tmp_path)
    argv = [sys.executable, "-c", LOADING]
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE) as running:
        assert running.stdout
        assert running.stdout.readline() == b"loading\n"
        running.send_signal(signal.SIGTERM)
        assert running.wait(5) == 143
