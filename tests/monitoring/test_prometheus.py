"""The dashboard and the alert rules before a real Prometheus: `make test-metrics`."""

import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.app.test_monitoring import ALERTS, dashboard_queries
from tests.support import live

EXAMPLES = Path(__file__).with_name("alerts_test.yml")
EMPTY_HERE = {
    "klein_gpu_memory_bytes": "there is no GPU",
    "klein_gpu_memory_free_bytes": "there is no GPU",
}
"""Metrics without a value on the CPU."""

pytestmark = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="needs prometheus and promtool: apt-get install prometheus",
)


def test_rules_are_valid_and_fire() -> None:
    """Each alert has an example of what it fires on and what not, and Prometheus agrees."""
    for argv in (["check", "rules", str(ALERTS)], ["test", "rules", str(EXAMPLES)]):
        done = subprocess.run(["promtool", *argv], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    rules = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
    tried = set(re.findall(r"Klein[A-Z]\w+", EXAMPLES.read_text()))
    assert tried == {rule["alert"] for rule in rules}


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """nano as it is served; every line of its log is JSON."""
    home, port = tmp_path_factory.mktemp("home"), live.free_port()
    folder = live.ROOT / "klein/nano/loras"
    own = {"KLEIN_LORA_DIR": str(folder), "KLEIN_LOG_FORMAT": "json"}
    env = live.environment(home, PORT=str(port), **own)
    argv = [str(live.BIN / "bentoml"), "serve", "service:Klein", "--port", str(port)]
    with live.process(argv, env, home / "log") as running:
        live.wait_for(f"http://localhost:{port}/readyz", 200, running, home / "log")
        yield f"localhost:{port}"
    lines = [json.loads(line) for line in (home / "log").read_text().splitlines()]
    assert {line["level"] for line in lines} == {"info"}


@pytest.fixture(scope="module")
def prometheus(klein: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Prometheus with the rules, reading `klein` every half second."""
    folder, port = tmp_path_factory.mktemp("prometheus"), live.free_port()
    scrape = {"job_name": "klein", "static_configs": [{"targets": [klein]}]}
    config = {
        "global": {"scrape_interval": "500ms", "evaluation_interval": "500ms"},
        "rule_files": [str(ALERTS)],
        "scrape_configs": [scrape],
    }
    (folder / "config.yml").write_text(yaml.safe_dump(config))
    argv = [
        "prometheus",
        f"--config.file={folder / 'config.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with live.process(argv, live.environment(folder), folder / "log") as running:
        live.wait_for(f"http://127.0.0.1:{port}/-/ready", 200, running, folder / "log")
        url = f"http://127.0.0.1:{port}"
        while not ask(url, "query", query="klein_ready")["result"]:  # it begins after seconds
            faults = [target["lastError"] for target in ask(url, "targets")["activeTargets"]]
            assert not any(faults)
            time.sleep(0.2)
        yield url


def ask(url: str, path: str, **query: str) -> Any:
    with urllib.request.urlopen(f"{url}/api/v1/{path}?{urllib.parse.urlencode(query)}") as answer:
        return json.load(answer)["data"]


def test_every_panel_shows_a_running_service(klein: str, prometheus: str) -> None:
    """No query fails, and each has data once images were drawn, refused and without their LoRA."""
    bodies: list[dict[str, Any]] = [
        {"loras": [{"path": "zibbo.safetensors"}]},
        {"loras": [{"path": "missing.safetensors"}]},
        {"width": 10},
        {"loras": [{"path": "missing.safetensors"}], "lora_error": "fail"},
    ]
    for _ in range(2):  # a rate needs two values that differ, with a scrape between
        for body in bodies:
            live.post(f"http://{klein}/generate", {"prompt": "x", "num_inference_steps": 2, **body})
        time.sleep(1.2)
    empty = {}
    for title, query in dashboard_queries(instance=klein):
        found = ask(prometheus, "query", query=query)["result"]
        if not found and not any(name in query for name in EMPTY_HERE):
            empty[title] = query
    assert not empty


def test_a_healthy_service_raises_no_alarm(prometheus: str) -> None:
    """Every rule is evaluated without an error; only LoRAs that were missing may be told of."""
    (group,) = ask(prometheus, "rules")["groups"]
    assert {rule["health"] for rule in group["rules"]} == {"ok"}
    firing = {rule["name"] for rule in group["rules"] if rule["state"] == "firing"}
    assert not firing
