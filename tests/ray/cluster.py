"""A real Ray on this machine with nano on its CPUs, deployed from the example that ships."""

import concurrent.futures
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import ray
import yaml
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from tests.support import loras
from tests.support.live import ROOT, environment, free_port

T = TypeVar("T")
NANO = loras.layers(192, double=2, single=4)
NAMES = tuple(f"lora{n}.safetensors" for n in range(6))
QUICK = {"width": 128, "height": 128, "num_inference_steps": 3}
"""A small image: some 50 ms on one core."""
SLOW = {"width": 256, "height": 256, "num_inference_steps": 100}
"""An image of some seconds."""
LONG = {"num_inference_steps": 100, "width": 256, "height": 256, "num_images": 4}
"""Several of them."""


@dataclass(frozen=True)
class Cluster:
    """A running application, and how to change it."""

    url: str
    client: httpx.Client
    config: dict[str, Any]

    def deploy(self, replica: dict[str, Any], env: dict[str, str] | None = None) -> None:
        """Change what the example says of a replica, and its environment."""
        config: dict[str, Any] = json.loads(json.dumps(self.config))
        (app,) = config["applications"]
        app["deployments"][0] |= replica
        app["runtime_env"]["env_vars"] |= env or {}
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config))

    def generate(self, **values: Any) -> dict[str, Any]:
        """The answer of generate_json; fails with the error of another status."""
        answer = self.client.post("/generate_json", json={"prompt": "a portrait", **values})
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    def metric(self, name: str, label: str = "") -> float:
        """The sum of a metric's samples."""
        text = self.client.get("/metrics").text
        rows = re.findall(rf"^{name}(?:{{(.*)}})? (\S+)$", text, re.MULTILINE)
        return sum(float(value) for labels, value in rows if label in (labels or ""))

    def replicas(self) -> int:
        """Those that the ingress knows."""
        text = self.client.get("/metrics").text
        return len(re.findall(r"^klein_replica_jobs{", text, re.MULTILINE))

    def wait(self, replicas: int, seconds: float = 150) -> float:
        """Until there are so many, and the seconds that took."""
        return until(lambda: self.replicas() == replicas, seconds)


def until(is_so: Callable[[], bool], seconds: float = 30) -> float:
    """Wait for it; the seconds that took."""
    started = time.monotonic()
    while not is_so():
        assert time.monotonic() < started + seconds, "it never came to that"
        time.sleep(0.05)
    return time.monotonic() - started


def at_once(work: Callable[[int], T], count: int, callers: int) -> list[T]:
    """`work` for each number, by as many callers at a time."""
    with concurrent.futures.ThreadPoolExecutor(callers) as pool:
        return list(pool.map(work, range(count)))


def pids(deployment: str, app: str = "klein") -> list[int]:
    """The processes of a deployment's replicas, in this cluster."""
    return titled(f"ray::ServeReplica:{app}:{deployment}")


def titled(title: str) -> list[int]:
    """The processes of this cluster whose title begins so."""
    home = f"HOME={os.environ['HOME']}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            line, env = ((entry / name).read_bytes() for name in ("cmdline", "environ"))
        except OSError:
            continue
        if home in env.split(b"\0") and line.startswith(title.encode()):
            found.append(int(entry.name))
    return found


def cpu_seconds(pid: int) -> float:
    """CPU that a process has used."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> int:
    """Bytes of main memory that a process has."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def make_loras(folder: Path, names: Iterable[str] = NAMES) -> None:
    """A LoRA of its own for each name."""
    for seed, name in enumerate(names):
        loras.write(folder / name, *loras.ai_toolkit(NANO, seed=100 * seed))


@contextmanager
def running(home: Path) -> Iterator[Cluster]:
    """Ray, and the example's application with two replicas."""
    folder = home / "loras"
    folder.mkdir()
    make_loras(folder)
    os.environ |= environment(
        home,
        KLEIN_LORA_DIR=str(folder),
        KLEIN_QUEUE_SIZE="500",
        PYTHONPATH=str(ROOT),
        OMP_NUM_THREADS="1",
        OMP_WAIT_POLICY="PASSIVE",
        RAY_SERVE_LOG_TO_STDERR="0",
    )
    config = yaml.safe_load((ROOT / "docs/ray-serve.yaml").read_text())
    port = config["http_options"]["port"] = free_port()
    config["http_options"]["host"] = "127.0.0.1"
    (app,) = config["applications"]
    app["runtime_env"]["env_vars"] = {}
    replica = app["deployments"][0]
    replica["ray_actor_options"] = {"num_gpus": 0, "num_cpus": 0.5}
    del replica["autoscaling_config"]
    replica["num_replicas"] = 2
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        url = f"http://127.0.0.1:{port}"
        limits = httpx.Limits(max_connections=100)
        with httpx.Client(base_url=url, timeout=120, limits=limits) as client:
            cluster = Cluster(url, client, config)
            cluster.deploy({})
            until(lambda: _ready(client), 120)
            cluster.wait(2)
            yield cluster
    finally:
        serve.shutdown()
        ray.shutdown()


def _ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.HTTPError:
        return False
