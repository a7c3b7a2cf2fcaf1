"""A worker out of memory for good is replaced: both doors as processes, without a model."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support import live, servers

TOO_MUCH = {"prompt": "too much"}
QUICK = {"prompt": "x"}
SLOW = {"prompt": "slow"}


@pytest.mark.parametrize("container", [False, True])
def test_bentoml_gets_a_fresh_worker(tmp_path: Path, container: bool) -> None:
    """All answers come whole; then BentoML starts one, or in a container ends with the server."""
    port, log = live.free_port(), tmp_path / "serve.log"
    url = f"http://localhost:{port}"
    argv = [str(live.BIN / "bentoml"), "serve", "tests.doors.hungry:Klein", "--port", str(port)]
    env = live.environment(tmp_path, **({"BENTOML_CONTAINERIZED": "true"} if container else {}))
    with live.process(argv, env, log) as running:
        live.wait_for(f"{url}/readyz", 200, running, log)
        with ThreadPoolExecutor() as pool:
            drawn = pool.submit(live.post, f"{url}/generate_json", SLOW)
            time.sleep(0.3)
            failing = pool.submit(live.post, f"{url}/generate", TOO_MUCH)
            time.sleep(0.3)
            waiting = pool.submit(live.post, f"{url}/generate_json", QUICK)
        assert drawn.result()[0] == 200
        assert _code(failing.result()) == (503, "out_of_memory")
        assert _code(waiting.result()) == (503, "not_ready")
        if container:
            assert running.wait(30) is not None
            return
        live.wait_for(f"{url}/readyz", 200, running, log)
        assert live.post(f"{url}/generate_json", QUICK)[0] == 200
    assert log.read_text().count(" is ready at ") == 2


def _code(answer: tuple[int, bytes]) -> tuple[int, str]:
    return answer[0], json.loads(answer[1])["error"]["code"]


RUNPOD = """
from klein.app import build
from klein.entrypoints import runpod
from tests.support import fakes
build.loader = lambda settings, environ: fakes.HungryPipeline
runpod.main()
"""


def test_runpod_is_asked_for_a_fresh_worker(tmp_path: Path) -> None:
    """With the answer; the worker takes no job after it, which another one can do, and ends."""
    jobs = [
        {"id": "good", "input": QUICK},
        {"id": "bad", "input": TOO_MUCH},
        {"id": "next", "input": QUICK},
    ]
    platform, log = servers.RunpodPlatform(jobs, cancel=""), tmp_path / "worker.log"
    with servers.serve(platform) as server:
        env = live.environment(tmp_path, **servers.runpod_hooks(server))
        with live.process([sys.executable, "-c", RUNPOD], env, log) as running:
            try:
                assert running.wait(60) == 0
            except subprocess.TimeoutExpired:
                raise AssertionError(log.read_text()[-3000:]) from None
    results = {job: body for job, body in platform.posts if body.get("status") != "IN_PROGRESS"}
    assert results["good"]["output"]["images"]
    assert "stopPod" not in results["good"]
    assert results["bad"]["error"].startswith("out_of_memory: it did not fit")
    assert results["bad"]["output"]["retryable"] is True
    assert "refresh_worker" not in results["bad"]["output"]
    assert results["bad"]["stopPod"] is True
    assert [job["id"] for job in platform.jobs] == ["next"]
