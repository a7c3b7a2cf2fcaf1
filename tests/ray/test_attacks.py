"""What goes wrong around klein on Ray: processes that die or stand still, full queues, greed."""

import concurrent.futures
import os
import signal
import time
from collections.abc import Callable

import httpx
import pytest

from tests.ray.cluster import LONG, NAMES, QUICK, SLOW, Cluster, at_once, pids, titled, until

KEYS = {name: f"{name}-{'k' * 32}" for name in ("many", "few")}


def generate_until(cluster: Cluster, seconds: float) -> int:
    """Ask one after the other for so long; the images that came. Fails if one did not."""
    ends, count = time.monotonic() + seconds, 0
    while time.monotonic() < ends:
        cluster.generate(**QUICK)
        count += 1
    return count


def down(cluster: Cluster, path: str) -> float:
    """Seconds until `path` is answered again."""

    def answers() -> bool:
        try:
            return cluster.client.get(path, timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    return until(answers, 90)


def is_idle(cluster: Cluster) -> Callable[[], bool]:
    return lambda: (
        cluster.metric("klein_replica_jobs") == cluster.metric("klein_queue_waiting") == 0
    )


def post_slow(cluster: Cluster) -> int:
    """The status of a request of some seconds; 0 if the connection broke."""
    try:
        return cluster.client.post("/generate_json", json={"prompt": "a", **SLOW}).status_code
    except httpx.HTTPError:
        return 0


def test_the_controller_dies(cluster: Cluster) -> None:
    """Nobody notices: it only starts and ends others."""
    (controller,) = titled("ray::ServeController")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        drawing = [pool.submit(generate_until, cluster, 8) for _ in range(4)]
        time.sleep(1)
        os.kill(controller, signal.SIGKILL)
        drawn = sum(each.result() for each in drawing)
    until(lambda: titled("ray::ServeController") not in ([], [controller]))
    print(f"{drawn} images while the controller was killed and started again")


@pytest.mark.parametrize("name", ["ray::ProxyActor", "ray::ServeReplica:klein:Ingress"])
def test_what_is_in_front_dies(cluster: Cluster, name: str) -> None:
    """Requests under way break or fail, and klein is there again by itself. Ray does not end what
    a dead proxy asked for: that is drawn for nobody."""
    (pid,) = titled(name)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(post_slow, cluster) for _ in range(6)]
        until(lambda: cluster.metric("klein_queue_waiting") == 2)
        os.kill(pid, signal.SIGKILL)
        answers = sorted(each.result() for each in asked)
    seconds = down(cluster, "/readyz")
    print(f"{name} was killed: {answers}, ready again after {seconds:.1f} s", flush=True)
    assert not set(answers) & {400, 404, 422}
    print(f"idle after {until(is_idle(cluster), 90):.1f} s more", flush=True)
    cluster.wait(2)
    assert cluster.generate(**QUICK)["images"]


def test_a_replica_that_stands_still(cluster: Cluster) -> None:
    """Its jobs are drawn by the other one; nobody loses anything."""
    cluster.wait(2)
    stopped = pids("Replica")[0]
    started = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(cluster.generate, **SLOW, seed=n) for n in range(6)]
        until(lambda: cluster.metric("klein_queue_waiting") == 2)
        os.kill(stopped, signal.SIGSTOP)
        try:
            for each in asked:
                each.result()
        finally:
            os.kill(stopped, signal.SIGKILL)
    print(f"6 jobs with a replica that stood still: {time.monotonic() - started:.0f} s")
    until(lambda: len(pids("Replica")) == 2 and stopped not in pids("Replica"), 60)
    cluster.wait(2)


def test_what_is_told_after_a_death(cluster: Cluster) -> None:
    """/loras names the replicas that there are, and counters do not go back."""
    at_once(lambda n: cluster.generate(**QUICK, loras=[{"path": NAMES[n % 6]}]), 12, 4)
    time.sleep(1.5)
    cluster.generate(**QUICK)
    before, warm = cluster.metric("klein_lora_switches_total"), cluster.client.get("/loras").json()
    assert before > 0
    os.kill(pids("Replica")[0], signal.SIGKILL)
    until(lambda: cluster.replicas() == 1, 20)
    (left,) = cluster.client.get("/loras").json()["warm"]
    assert left in warm["warm"]
    cluster.wait(2)
    cluster.generate(**QUICK)
    assert cluster.metric("klein_lora_switches_total") >= before
    assert len(cluster.client.get("/loras").json()["warm"]) == 2


def test_a_job_that_waits_is_cancelled_at_once(cluster: Cluster) -> None:
    """And those who hang up while they wait leave no job behind."""
    for number in range(6):
        made = cluster.client.put(f"/jobs/q{number}", json={"input": {"prompt": "a", **LONG}})
        assert made.status_code == 202, made.text
    until(lambda: cluster.metric("klein_queue_waiting") == 2)
    with pytest.raises(httpx.ReadTimeout):
        cluster.client.post("/generate_json", json={"prompt": "a", **LONG}, timeout=1)
    for number in reversed(range(6)):
        started = time.monotonic()
        canceled = cluster.client.post(f"/jobs/q{number}/cancel").json()
        assert canceled["status"] == "canceled"
        assert time.monotonic() - started < 2
    until(is_idle(cluster), 5)


def test_the_ingress_stays_when_replicas_change(cluster: Cluster) -> None:
    """A change of a replica's entry is not one of the ingress."""
    cluster.wait(2)
    before = pids("Ingress")
    cluster.deploy({"num_replicas": 3})
    cluster.wait(3)
    cluster.deploy({"num_replicas": None, "autoscaling_config": {"min_replicas": 2}})
    cluster.deploy({})
    cluster.wait(2)
    assert pids("Ingress") == before


def test_a_full_queue_and_two_keys(cluster: Cluster) -> None:
    """The queue refuses with 429 and Retry-After; a key with two jobs does not wait for all of the
    jobs of one with many."""
    keys = ",".join(f"{name}:{key}" for name, key in KEYS.items())
    old = {*pids("Ingress"), *pids("Replica")}
    cluster.deploy({}, {"KLEIN_API_KEYS": keys, "KLEIN_QUEUE_SIZE": "12"})
    until(
        lambda: len(pids("Ingress") + pids("Replica")) == 3 and not old & set(pids("Ingress")), 90
    )
    order: list[str] = []

    def ask(name: str) -> httpx.Response:
        body = {"prompt": "a", **QUICK, "num_inference_steps": 100}
        headers = {"authorization": f"Bearer {KEYS[name]}"}
        answer = cluster.client.post("/generate_json", json=body, headers=headers)
        order.append(name)
        return answer

    until(lambda: ask("many").status_code == 200, 60)
    until(lambda: not old & set(pids("Replica")), 90)
    order.clear()
    assert cluster.client.get("/loras").status_code == 401
    cluster.client.headers["authorization"] = f"Bearer {KEYS['few']}"  # of metrics too
    cluster.wait(2)
    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        many = [pool.submit(ask, "many") for _ in range(10)]
        until(lambda: cluster.metric("klein_queue_waiting") >= 4)
        few = [pool.submit(ask, "few") for _ in range(2)]
        assert all(each.result().status_code == 200 for each in [*many, *few])
    assert max(n for n, name in enumerate(order) if name == "few") < 9, str(order)
    answers = at_once(lambda _: ask("many"), 40, 40)
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429}
    full = next(answer for answer in answers if answer.status_code == 429)
    assert int(full.headers["retry-after"]) >= 1
    assert full.json()["error"]["code"] == "queue_full"
    before = {*pids("Ingress")}
    del cluster.client.headers["authorization"]
    cluster.deploy({})
    until(lambda: not before & set(pids("Ingress")), 90)
    until(lambda: cluster.client.get("/loras").status_code == 200, 60)
