"""`python -m tests.ray.measure throughput`: what two replicas draw over one, which needs two idle
cores, or else is read by the CPU beside it; `… ingress`: what the ingress costs, and an empty one.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from ray import serve

from tests.ray import empty
from tests.ray.cluster import QUICK, Cluster, at_once, cpu_seconds, pids, running

IMAGE = {"width": 256, "height": 256, "num_inference_steps": 12}
"""About a second on one core: long beside what it costs to send it."""
IMAGES = 20
ROUNDS = 2
REQUESTS = 200
CALLERS = 4


def throughput(cluster: Cluster) -> None:
    """Images a second of one replica and of two, in turn."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    for number in range(2 * ROUNDS):
        replicas = 1 + number % 2
        cluster.deploy({"num_replicas": replicas})
        cluster.wait(replicas)
        workers = wait_for_pids("Replica", replicas)
        at_once(lambda _: cluster.generate(**IMAGE), 2 * replicas, CALLERS)
        used, started = sum(map(cpu_seconds, workers)), time.monotonic()
        at_once(lambda _: cluster.generate(**IMAGE), IMAGES, CALLERS)
        seconds = time.monotonic() - started
        used = sum(map(cpu_seconds, workers)) - used
        rates[replicas].append(IMAGES / seconds)
        print(
            f"{replicas} replicas: {IMAGES / seconds:.2f} images/s, {used / IMAGES:.2f} s of CPU "
            f"an image, {used / seconds:.2f} cores in use, load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
    one, two = statistics.median(rates[1]), statistics.median(rates[2])
    print(f"2 replicas over 1: {two / one:.2f}, by the medians", flush=True)


def wait_for_pids(deployment: str, count: int, app: str = "klein") -> list[int]:
    """Its processes, once there are so many."""
    while len(found := pids(deployment, app)) != count:
        time.sleep(0.1)
    return found


def ingress(name: str, work: Callable[[int], Any], app: str) -> None:
    """CPU of an ingress a request, by its kinds of threads, less what it uses while idle."""
    (pid,) = pids("Ingress", app)
    at_once(work, 40, CALLERS)
    idle, seconds = cpu_of(pid, lambda: time.sleep(5))
    idle = {kind: used / seconds for kind, used in idle.items()}
    busy, seconds = cpu_of(pid, lambda: at_once(work, REQUESTS, CALLERS))
    each = {kind: (used - idle.get(kind, 0) * seconds) / REQUESTS for kind, used in busy.items()}
    most = sorted(each, key=lambda kind: -each[kind])[:4]
    print(
        f"{name}: {sum(each.values()) * 1e3:.1f} ms of CPU a request ("
        + ", ".join(f"{kind} {each[kind] * 1e3:.1f}" for kind in most)
        + f"), {sum(idle.values()) * 1e3:.0f} ms a second while idle, {REQUESTS / seconds:.0f} "
        f"requests/s, load {os.getloadavg()[0]:.1f}",
        flush=True,
    )


def cpu_of(pid: int, work: Callable[[], Any]) -> tuple[dict[str, float], float]:
    """Seconds of CPU by kind of thread that a process uses during `work`, and how long it took."""
    before, started = threads(pid), time.monotonic()
    work()
    seconds = time.monotonic() - started
    return {kind: used - before.get(kind, 0) for kind, used in threads(pid).items()}, seconds


def threads(pid: int) -> dict[str, float]:
    """Seconds of CPU that each kind of thread has used."""
    used: dict[str, float] = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        kind = (task / "comm").read_text().strip().rstrip("0123456789")
        nanoseconds = int((task / "schedstat").read_text().split()[0])
        used[kind] = used.get(kind, 0.0) + nanoseconds / 1e9
    return used


def ingresses(cluster: Cluster) -> None:
    """klein's and an empty one, in turn."""

    def ask(path: str, number: int) -> None:
        body = {"prompt": "a portrait", "seed": number, **QUICK}
        answer: httpx.Response = cluster.client.post(f"{path}/generate_json", json=body)
        answer.raise_for_status()

    serve.run(empty.app({}), name="empty", route_prefix="/empty")
    for _ in range(ROUNDS):
        ingress("klein", lambda number: ask("", number), "klein")
        ingress("empty", lambda number: ask("/empty", number), "empty")


def main() -> None:
    """Print one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parts = {"throughput": throughput, "ingress": ingresses}
    parser.add_argument("part", choices=parts)
    part = parts[parser.parse_args().part]
    with tempfile.TemporaryDirectory() as home, running(Path(home)) as cluster:
        part(cluster)


if __name__ == "__main__":
    main()
