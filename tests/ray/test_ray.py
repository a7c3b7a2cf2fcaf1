"""klein on a real Ray: the same images as from one worker, whatever happens to the replicas."""

import asyncio
import base64
import os
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from ray import serve

from klein.app import build
from klein.app.replica import Drawn, Order
from klein.models.catalog import MODELS
from klein.output import response
from klein.request.resolve import resolve
from klein.request.schema import parse
from klein.settings import Settings
from tests.ray.cluster import (
    LONG,
    NAMES,
    QUICK,
    Cluster,
    at_once,
    cpu_seconds,
    pids,
    resident,
    until,
)

SEEDS = 10
"""Images of each LoRA that are told apart."""


def request(number: int) -> dict[str, Any]:
    """The request of that number: one of 6 LoRAs and 10 seeds, in an order that is no order."""
    chance = random.Random(number)
    lora = {"path": chance.choice(NAMES), "scale": 1.0}
    return {**QUICK, "seed": chance.randrange(SEEDS), "loras": [lora]}


def key(asked: dict[str, Any]) -> tuple[str, int]:
    return asked["loras"][0]["path"], asked["seed"]


Wanted = dict[tuple[str, int], bytes]


@pytest.fixture(scope="module")
def wanted(cluster: Cluster) -> Wanted:
    """The file of each image, as a single worker in this process makes it."""
    settings = Settings.from_env(os.environ)
    alone = build.generator(settings, build.loader(settings, os.environ))
    alone.engine.wait_ready()

    async def draw(name: str, seed: int) -> bytes:
        asked = parse(
            {"prompt": "a portrait", **QUICK, "seed": seed, "loras": [{"path": name, "scale": 1.0}]}
        )
        generated = await alone.run(asked, alone.context())
        (image,) = response.encode(generated.result, generated.delivery, generated.marks)
        return image.data

    async def draw_all() -> Wanted:
        return {(name, seed): await draw(name, seed) for name in NAMES for seed in range(SEEDS)}

    try:
        return asyncio.run(draw_all())
    finally:
        alone.stop()


def check(answer: dict[str, Any], asked: dict[str, Any], wanted: Wanted) -> None:
    (image,) = answer["images"]
    assert base64.b64decode(image["base64"]) == wanted[key(asked)], key(asked)


def draw_and_check(cluster: Cluster, wanted: Wanted, count: int, callers: int = 24) -> None:
    def one(number: int) -> None:
        check(cluster.generate(**request(number)), request(number), wanted)

    at_once(one, count, callers)


def test_images_are_those_of_one_worker(cluster: Cluster, wanted: Wanted) -> None:
    """300 requests for 6 LoRAs on 2 replicas: byte for byte. LoRAs are switched at most a quarter
    as often as when replicas are chosen at random; the ingress uses at most 20 ms of CPU for a
    request on a busy machine, never loads torch, and keeps nothing."""
    (ingress,) = pids("Ingress")
    draw_and_check(cluster, wanted, 40)
    before, memory = Counter(_routed(cluster)), resident(ingress)
    used = cpu_seconds(ingress)
    draw_and_check(cluster, wanted, 300)
    used = cpu_seconds(ingress) - used
    routed = Counter(_routed(cluster)) - before
    switches = (300 - routed["same"]) / 300
    by_chance = _switches_at_random(300)
    print(f"switches {switches:.3f} by affinity, {by_chance:.3f} at random")
    print(f"ingress: {used / 300 * 1e3:.1f} ms of CPU a request")
    print(f"ingress: {(resident(ingress) - memory) / 1e6:.1f} MB more")
    assert sum(routed.values()) == 300
    assert switches <= by_chance / 4
    assert used / 300 <= 0.020
    assert resident(ingress) - memory < 20e6
    assert b"libtorch" not in Path(f"/proc/{ingress}/maps").read_bytes()


def _routed(cluster: Cluster) -> dict[str, int]:
    names = ("same", "warm", "near", "cold")
    return {name: int(cluster.metric("klein_routed_total", name)) for name in names}


def _switches_at_random(count: int) -> float:
    """Of requests that Ray sends to whichever replica has fewer: how many changed its LoRAs, as
    the replicas' own reports tell."""
    handle = serve.get_deployment_handle("Replica", "klein").options(
        method_name="draw", stream=True
    )
    changed = []

    async def one(number: int, places: asyncio.Semaphore) -> None:
        resolved = resolve(parse({"prompt": "a", **request(number)}), MODELS["nano"], lambda: 0)
        async with places:
            async for told in handle.remote("", Order(f"r{number}", resolved, 60.0, 0.0)):
                if isinstance(told, Drawn):
                    (report,) = told.result.loras
                    changed.append((report.seconds or 0) > 0.0005)

    async def draw() -> None:
        places = asyncio.Semaphore(6)
        await asyncio.gather(*(one(number, places) for number in range(count)))

    asyncio.run(draw())
    assert len(changed) == count
    return sum(changed) / count


def test_a_replica_that_is_killed_loses_nothing(cluster: Cluster, wanted: Wanted) -> None:
    """kill -9 while it draws: every caller gets its image, from the other replica, and a new
    replica comes."""
    again = cluster.metric("klein_drawn_again_total")

    def kill() -> None:
        time.sleep(0.5)
        os.kill(pids("Replica")[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    draw_and_check(cluster, wanted, 80)
    killer.join()
    assert cluster.metric("klein_drawn_again_total") > again
    until(lambda: len(pids("Replica")) == 2)
    print(f"whole again {cluster.wait(2):.1f} s after the load")
    draw_and_check(cluster, wanted, 20)


def test_cancelling_frees_the_replica(cluster: Cluster) -> None:
    """Within a step: others are not waited for, and its place is free at once."""
    for id in ("long1", "long2"):
        made = cluster.client.put(f"/jobs/{id}", json={"input": {"prompt": "a", **LONG}})
        assert made.status_code == 202
    until(lambda: _status(cluster, "long1") == _status(cluster, "long2") == "processing")
    started = time.monotonic()
    assert cluster.client.post("/jobs/long1/cancel").json()["status"] == "canceled"
    seconds = time.monotonic() - started
    print(f"cancelled in {seconds * 1e3:.0f} ms")
    assert seconds < 1.5
    assert cluster.metric("klein_replica_jobs") == 1
    assert _status(cluster, "long2") == "processing"
    cluster.client.post("/jobs/long2/cancel")
    assert cluster.metric("klein_replica_jobs") == 0


def _status(cluster: Cluster, id: str) -> str:
    return str(cluster.client.get(f"/jobs/{id}").json()["status"])


def test_a_caller_that_hangs_up_frees_the_replica(cluster: Cluster) -> None:
    with pytest.raises(httpx.ReadTimeout):
        cluster.client.post("/generate_json", json={"prompt": "a", **LONG}, timeout=1)
    until(lambda: cluster.metric("klein_replica_jobs") == 0, 5)


def test_a_job_is_followed_through_the_ingress(cluster: Cluster) -> None:
    """Its events: states, progress, previews, the end; its image is a link to the ingress."""
    asked = {"input": {"prompt": "a", **QUICK, "num_inference_steps": 40}}
    job = cluster.client.post("/jobs", json=asked).json()
    events = []
    with cluster.client.stream("GET", job["urls"]["stream"]) as stream:
        for line in stream.iter_lines():
            if line.startswith("event: "):
                events.append(line.removeprefix("event: "))
    assert events[-1] == "completed"
    assert {"status", "progress", "preview"} <= set(events)
    done = cluster.client.get(job["urls"]["get"]).json()
    image = cluster.client.get(done["output"]["images"][0]["url"])
    assert image.headers["content-type"] == "image/png"


def test_openais_client_and_the_page(cluster: Cluster) -> None:
    """Through the ingress as through BentoML."""
    with openai.OpenAI(api_key="none", base_url=f"{cluster.url}/v1", max_retries=0) as client:
        drawn = client.images.generate(prompt="a portrait", size="256x256", quality="low")
        assert drawn.data
        assert base64.b64decode(drawn.data[0].b64_json or "").startswith(b"\x89PNG")
        assert [model.id for model in client.models.list()] == ["nano"]
    page = cluster.client.get("/ui")
    assert "<html" in page.text
    for path in ("/ui/app.js", "/docs", "/static_content/swagger-ui.css", "/livez", "/ping"):
        assert cluster.client.get(path).status_code == 200, path


def test_what_is_warm_is_told(cluster: Cluster) -> None:
    """By /loras and by the metrics, for each replica."""
    cluster.generate(**QUICK, loras=[{"path": NAMES[0]}])
    warm = cluster.client.get("/loras").json()["warm"]
    assert len(warm) == 2
    assert any(sets[0] == NAMES[0] for sets in warm.values() if sets)
    assert cluster.metric("klein_replica_warm", f'loras="{NAMES[0]}"') >= 1


def test_replicas_come_and_go_under_load(cluster: Cluster, wanted: Wanted) -> None:
    """Ray's autoscaler goes from 1 to 3 while a queue waits and back when it is gone, and every
    replica is then replaced in a rolling update of the whole application: nothing is lost."""
    scaling = {
        "min_replicas": 1,
        "max_replicas": 3,
        "target_ongoing_requests": 1,
        "look_back_period_s": 1,
        "upscale_delay_s": 0.5,
        "downscale_delay_s": 2,
    }
    with Load(cluster, wanted) as drawn:
        cluster.deploy({"num_replicas": None, "autoscaling_config": scaling})
        print(f"3 replicas after {cluster.wait(3):.1f} s")
        before = set(pids("Replica"))
        cluster.deploy({"num_replicas": 2}, {"KLEIN_QUEUE_SIZE": "499"})
        until(lambda: len(pids("Replica")) == 2 and not before & set(pids("Replica")), 90)
        cluster.wait(2)
    print(f"{len(drawn)} images during scaling and the update")
    assert len(drawn) > 50
    cluster.deploy({"num_replicas": None, "autoscaling_config": scaling})
    print(f"1 replica after {cluster.wait(1):.1f} s")


class Load:
    """Twelve callers who ask and check without a pause; leaving waits for their last answers and
    raises what any of them met."""

    def __init__(self, cluster: Cluster, wanted: Wanted) -> None:
        self._over = threading.Event()
        self._faults: list[BaseException] = []
        self._drawn: list[int] = []
        self._threads = [
            threading.Thread(target=self._ask, args=[cluster, wanted, number * 1000])
            for number in range(12)
        ]

    def __enter__(self) -> list[int]:
        for thread in self._threads:
            thread.start()
        return self._drawn

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        if self._faults:
            raise self._faults[0]

    def _ask(self, cluster: Cluster, wanted: Wanted, number: int) -> None:
        try:
            while not self._over.is_set():
                check(cluster.generate(**request(number)), request(number), wanted)
                self._drawn.append(number)
                number += 1
        except BaseException as error:
            self._faults.append(error)
