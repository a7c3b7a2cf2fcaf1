"""Fifty callers for five minutes on the built-in model: `python -m tests.attacks.load`.

Every kind of call is made at once, hostile requests and callers who hang up among them. What is
counted: statuses, how each accepted job ended, the worker's memory, how long probes waited.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx

from tests.attacks import hostile
from tests.attacks.processes import NANO, Held, serving, worker
from tests.support import live, pictures

SETTINGS = {
    "KLEIN_TIMEOUT": "60",
    "KLEIN_QUEUE_SIZE": "16",
    "KLEIN_JOBS_KEEP_SECONDS": "30",
    "KLEIN_JOBS_KEEP_MB": "5",
    "KLEIN_EVENT_STREAMS": "60",
}
HUNG_SECONDS = 90.0
"""Half as long again as a job may take: nothing is answered so late."""
HOSTILE = 3000
WARM = 60.0
"""Seconds after which memory has to stay as it is."""
LOOKS = ["/presets", "/models", "/capabilities", "/loras", "/v1/models", "/jobs", "/ping", "/ui/"]
LAST_EVENTS = {"completed", "failed", "canceled"}
PROBE = """
import json, sys, time, urllib.request
url, seconds, waits = sys.argv[1], float(sys.argv[2]), []
end = time.monotonic() + seconds
while time.monotonic() < end:
    started = time.monotonic()
    assert urllib.request.urlopen(url, timeout=30).status == 200
    waits.append(time.monotonic() - started)
    time.sleep(0.2)
print(json.dumps(waits))
"""


@dataclass
class Tally:
    """What happened."""

    statuses: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    resumed: int = 0

    def count(self, kind: str, status: int, body: bytes) -> None:
        """Note an answer; a 5xx that is no honest refusal is a fault."""
        self.statuses[f"{kind} {status}"] += 1
        if fault := hostile.Reply(status, body, 0).fault():
            self.faults.append(f"{kind}: {fault[:300]}")


@dataclass
class Caller:
    """One of the fifty."""

    client: httpx.AsyncClient
    rng: random.Random
    tally: Tally
    attacks: list[bytes]

    def body(self) -> dict[str, Any]:
        steps = self.rng.randint(1, 3)
        seed = self.rng.randrange(2**32)
        size = self.rng.choice([64, 128])
        return {
            "prompt": "x", "seed": seed, "num_inference_steps": steps, "width": size, "height": 64,
        }  # fmt: skip

    async def ask(self, kind: str, method: str, path: str, **more: Any) -> httpx.Response:
        answer = await self.client.request(method, path, **more)
        self.tally.count(kind, answer.status_code, answer.content)
        if answer.status_code == 429:
            await asyncio.sleep(min(2.0, float(answer.headers["retry-after"])))
        return answer

    async def image(self) -> None:
        await self.ask("generate", "POST", "/generate", json=self.body())

    async def image_json(self) -> None:
        more = {"num_images": self.rng.randint(1, 2), "loras": [{"path": "missing.safetensors"}]}
        await self.ask("generate_json", "POST", "/generate_json", json=self.body() | more)

    async def stream(self) -> None:
        """OpenAI's events: partial images, then the image or an error."""
        body = {"prompt": "x", "size": "64x64", "num_inference_steps": 3, "stream": True}
        path, more = "/v1/images/generations", {"partial_images": 2}
        async with self.client.stream("POST", path, json=body | more) as answer:
            text = (await answer.aread()).decode()
        self.tally.count("stream", answer.status_code, text.encode())
        told = ("image_generation.completed", *hostile.HONEST)
        if answer.status_code == 200 and not any(each in text for each in told):
            self.tally.faults.append(f"stream: {text[-300:]}")

    async def edit(self) -> None:
        form = {"prompt": "x", "num_inference_steps": "1"}
        files = {"image": ("a.png", pictures.data(pictures.noise(64, 64)))}
        await self.ask("edit", "POST", "/v1/images/edits", data=form, files=files)

    async def look(self) -> None:
        path = self.rng.choice(
            [
                "/presets",
                "/models",
                "/capabilities",
                "/loras",
                "/v1/models",
                "/jobs",
                "/ping",
                "/ui/",
            ]
        )
        await self.ask("look", "GET", path)

    async def hang_up(self) -> None:
        """Leave while the image is drawn."""
        try:
            async with asyncio.timeout(self.rng.uniform(0.01, 0.5)):
                await self.client.post("/generate", json=self.body() | {"num_inference_steps": 50})
        except TimeoutError:
            self.tally.statuses["hung up"] += 1

    async def attack(self) -> None:
        if not self.attacks:
            return
        url = self.client.base_url
        reply = await hostile.send(url.host, url.port or 80, self.attacks.pop())
        self.tally.count("hostile", reply.status, reply.body)

    async def follow(self) -> None:
        """A job to its end, its events read in pieces: the connection is dropped at random."""
        answer = await self.ask("job", "POST", "/jobs", json={"input": self.body()})
        if answer.status_code != 202:
            return
        job, last, names = answer.json()["id"], 0, Counter[str]()
        while not LAST_EVENTS & set(names):
            headers = {"last-event-id": str(last)}
            most = self.rng.choice([1, 2, 5, 1000])
            path = f"/jobs/{job}/events"
            async with self.client.stream("GET", path, headers=headers) as events:
                if events.status_code != 200:
                    self.tally.faults.append(f"events of {job}: {events.status_code}")
                    return
                async for event, id in _events(events, most):
                    if id <= last:
                        self.tally.faults.append(f"job {job}: event {id} after {last}")
                    names[event], last = names[event] + 1, id
            self.tally.resumed += 1
        await self.ended(job, {name for name in names if name in LAST_EVENTS})

    async def cancel(self) -> None:
        """A job, given up after a moment; one that was quicker has ended by itself."""
        slow = self.body() | {"num_inference_steps": 20}
        answer = await self.ask("job", "POST", "/jobs", json={"input": slow})
        if answer.status_code != 202:
            return
        job = answer.json()["id"]
        await asyncio.sleep(self.rng.uniform(0, 0.5))
        await self.ask("cancel", "POST", f"/jobs/{job}/cancel")
        await self.ended(job, None)

    async def ended(self, job: str, told: set[str] | None) -> None:
        """Every accepted job has one end, the one that its events told."""
        status = (await self.client.get(f"/jobs/{job}")).json().get("status", "lost")
        self.tally.ends[status] += 1
        names = {"succeeded": "completed", "failed": "failed", "canceled": "canceled"}
        if status not in names or (told is not None and told != {names[status]}):
            self.tally.faults.append(f"job {job} has {status}, its events told {told}")


DOINGS: list[tuple[int, Callable[[Caller], Awaitable[None]]]] = [
    (3, Caller.image), (2, Caller.image_json), (2, Caller.stream), (2, Caller.edit),
    (4, Caller.look), (2, Caller.hang_up), (4, Caller.attack), (3, Caller.follow),
    (2, Caller.cancel),
]  # fmt: skip


async def _events(answer: httpx.Response, most: int) -> Any:
    """Up to `most` events of a stream: name and id."""
    name, seen = "", 0
    async for line in answer.aiter_lines():
        if line.startswith("event: "):
            name = line[7:]
        if line.startswith("id: "):
            yield name, int(line[4:])
            seen += 1
            if seen == most:
                return


async def call(caller: Caller, end: float) -> None:
    """One thing after the other until `end`."""
    weights, doings = zip(*DOINGS, strict=True)
    while time.monotonic() < end:
        (doing,) = caller.rng.choices(doings, weights)
        try:
            async with asyncio.timeout(HUNG_SECONDS):
                await doing(caller)
        except TimeoutError:
            caller.tally.faults.append(f"{doing.__name__} hung")
        except httpx.HTTPError as error:
            caller.tally.faults.append(f"{doing.__name__}: {error!r}")


async def watch(pid: int, end: float) -> list[tuple[float, float]]:
    """Seconds and megabytes of the worker, every second."""
    started, samples = time.monotonic(), []
    while time.monotonic() < end:
        samples.append((time.monotonic() - started, Held.by(pid).mb))
        await asyncio.sleep(1)
    return samples


async def load(url: str, pid: int, seconds: float, clients: int) -> dict[str, Any]:
    """Callers for `seconds`; the figures."""
    tally, end = Tally(), time.monotonic() + seconds
    source = hostile.requests(seed=random.randrange(1000))
    attacks = [next(source) for _ in range(int(HOSTILE * seconds / 300))]
    argv = [sys.executable, "-c", PROBE, f"{url}/readyz", str(seconds)]
    probe = await asyncio.create_subprocess_exec(*argv, stdout=subprocess.PIPE)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        callers = [
            call(Caller(client, random.Random(n), tally, attacks), end) for n in range(clients)
        ]
        watching = asyncio.create_task(watch(pid, end))
        await asyncio.gather(*callers)
    samples = await watching
    waits = json.loads((await probe.communicate())[0])
    warm = min(WARM, seconds / 2)
    first = median(mb for at, mb in samples if warm <= at < warm + 15)
    last = median(mb for at, mb in samples if at >= seconds - 15)
    return {
        "requests": sum(tally.statuses.values()),
        "statuses": dict(sorted(tally.statuses.items())),
        "jobs": dict(tally.ends),
        "event streams": tally.resumed,
        "hostile left": len(attacks),
        "memory MB": {"warm": first, "end": last, "change %": round(100 * (last / first - 1), 1)},
        "readyz ms": {
            "p50": round(1000 * median(waits), 1),
            "p99": round(1000 * quantiles(waits, n=100)[98], 1),
            "most": round(1000 * max(waits), 1),
        },
        "held": vars(Held.by(pid)),
        "faults": tally.faults,
    }


def main() -> None:
    """Print the figures; the exit status tells whether there were faults."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=50)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        with serving(Path(home), NANO, **SETTINGS) as (host, running, log):
            url = f"http://{host}"
            live.wait_for(f"{url}/readyz", 200, running, log)
            figures = asyncio.run(load(url, worker(running.pid), args.seconds, args.clients))
        print(json.dumps(figures, indent=2))
        print(log.read_text().count("Traceback"), "tracebacks in the log")
    sys.exit(bool(figures["faults"]))


if __name__ == "__main__":
    main()
