"""`klein serve --replicas N`, as its page gives it."""

import concurrent.futures
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from klein.entrypoints.cli.main import main
from tests.ray.cluster import QUICK, SLOW, until
from tests.support.live import ROOT, environment, free_port, post, process, wait_for


def test_it_serves_and_drains(tmp_path: Path) -> None:
    """One address for two replicas; its port is told when it is taken; SIGTERM answers who is
    there, waiting ones included, and refuses others."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    argv = [sys.executable, "-m", "klein", "serve", "--replicas", "2", "--port", str(port)]
    env = environment(tmp_path, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    log = tmp_path / "log"
    with process(argv, env, log) as running, concurrent.futures.ThreadPoolExecutor(6) as pool:
        wait_for(f"{url}/readyz", 200, running, log)
        until(lambda: "klein is ready with 2 replicas" in log.read_text(), 60)
        assert post(f"{url}/generate_json", {"prompt": "a", **QUICK})[0] == 200
        again = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True)
        assert again.returncode == 2, again.stderr
        assert "--port" in again.stderr
        assert "Traceback" not in again.stderr
        asked = [
            pool.submit(post, f"{url}/generate_json", {"prompt": "a", **SLOW}) for _ in range(6)
        ]
        until(lambda: _metric(url, "klein_queue_waiting") == 2)
        running.send_signal(signal.SIGTERM)
        time.sleep(1)
        assert post(f"{url}/generate_json", {"prompt": "a", **QUICK})[0] == 503
        assert [each.result()[0] for each in asked] == [200] * 6
        assert running.wait(60) == 0, log.read_text()[-2000:]


def _metric(url: str, name: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        found = re.search(rf"^{name} (\S+)$", answer.read().decode(), re.MULTILINE)
    return float(found[1]) if found else -1


@pytest.mark.parametrize("asked", ["0", "-1"])
def test_replicas_are_counted_from_one(
    asked: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL_ID", "nano")
    assert main(["serve", "--replicas", asked]) == 2
    assert "--replicas" in capsys.readouterr().err


def test_each_replica_needs_its_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told before anything is fetched."""
    monkeypatch.setenv("MODEL_ID", "black-forest-labs/FLUX.2-klein-base-9B")
    assert main(["serve", "--replicas", "99"]) == 2
    assert "99 replicas take a GPU each, and this machine has" in capsys.readouterr().err
