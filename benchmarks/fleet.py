"""A thousand GPUs that do not exist: how routing by LoRA acts on warm rate, network and waiting.

`python -m benchmarks.fleet` simulates a fleet whose requests name LoRAs by a Zipf law. Every GPU
keeps the factors of the LoRAs it drew last, its host's disk keeps more of them, and what neither
has comes from shared storage over the network. The rule `affinity` is klein's own
(klein/engine/pool.py); the others are what one would use instead.
"""

import argparse
import heapq
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from klein.engine.pool import Entry, Pool, Worker

GB = 1e9
HOST = 8
"""GPUs that share a disk."""
CASES = ((1.0, 0.5), (1.0, 0.8), (1.3, 0.8))
"""The Zipf exponents and loads of the first table."""


@dataclass(frozen=True)
class Fleet:
    """What is simulated; seconds and bytes."""

    gpus: int = 1000
    loras: int = 10_000
    zipf: float = 1.0
    load: float = 0.8
    draw: float = 4.0
    lora_bytes: float = 0.7 * GB
    on_gpu: int = 2
    on_disk: int = 280
    read: float = 0.5
    network: float = 1.25 * GB
    requests: int = 200_000


@dataclass
class Cache:
    """The keys used last."""

    size: int
    keys: OrderedDict[int, None] = field(default_factory=OrderedDict)

    def use(self, key: int) -> bool:
        """Whether it was there; it is now."""
        hit = key in self.keys
        self.keys[key] = None
        self.keys.move_to_end(key)
        if len(self.keys) > self.size:
            self.keys.popitem(last=False)
        return hit


@dataclass
class Machine:
    """One GPU, and the disk of its host."""

    gpu: Cache
    disk: Cache
    last: int = -1


@dataclass(frozen=True)
class Request:
    """A request of the simulation."""

    arrived: float
    key: int
    draw: float


class Rule(Protocol):
    """Gives jobs to GPUs."""

    def put(self, request: Request) -> None: ...

    def next(self) -> tuple[Request, int] | None: ...

    def done(self, gpu: int, request: Request) -> None: ...


class Fifo:
    """The first that waits goes to a free GPU: one of chance."""

    def __init__(self, fleet: Fleet, chance: np.random.Generator) -> None:
        self._waiting: list[Request] = []
        self._taken = 0
        self._free = list(range(fleet.gpus))
        self._chance = chance

    def put(self, request: Request) -> None:
        self._waiting.append(request)

    def next(self) -> tuple[Request, int] | None:
        if not self._free or self._taken == len(self._waiting):
            return None
        place = int(self._chance.integers(len(self._free)))
        self._free[place], self._free[-1] = self._free[-1], self._free[place]
        self._taken += 1
        return self._waiting[self._taken - 1], self._free.pop()

    def done(self, gpu: int, request: Request) -> None:
        self._free.append(gpu)


class Hashed:
    """Each LoRA has its GPU, and waits for it."""

    def __init__(self, fleet: Fleet, chance: np.random.Generator) -> None:
        self._home = chance.integers(fleet.gpus, size=fleet.loras)
        self._waiting: dict[int, list[Request]] = {}
        self._busy: set[int] = set()
        self._ready: list[int] = []

    def put(self, request: Request) -> None:
        gpu = int(self._home[request.key])
        self._waiting.setdefault(gpu, []).append(request)
        self._ready.append(gpu)

    def next(self) -> tuple[Request, int] | None:
        while self._ready:
            gpu = self._ready.pop()
            if gpu not in self._busy and self._waiting.get(gpu):
                self._busy.add(gpu)
                return self._waiting[gpu].pop(0), gpu
        return None

    def done(self, gpu: int, request: Request) -> None:
        self._busy.discard(gpu)
        self._ready.append(gpu)


class Affinity:
    """klein's pool. A GPU holds its second job until it is done with the first."""

    def __init__(self, fleet: Fleet, chance: np.random.Generator) -> None:
        self._pool: Pool[Request] = Pool(10**9)
        self._pool.members({str(gpu): str(gpu // HOST) for gpu in range(fleet.gpus)})
        self._given: dict[int, list[tuple[Entry[Request], Worker[Request]]]] = {}
        self._ready: list[int] = []

    def put(self, request: Request) -> None:
        self._pool.put(Entry(request, str(request.key)))

    def next(self) -> tuple[Request, int] | None:
        while found := self._pool.next():
            entry, worker, _ = found
            held = self._given.setdefault(int(worker.id), [])
            held.append((entry, worker))
            if len(held) == 1:
                return entry.item, int(worker.id)
        if self._ready:
            gpu = self._ready.pop()
            return self._given[gpu][0][0].item, gpu
        return None

    def done(self, gpu: int, request: Request) -> None:
        self._pool.done(*self._given[gpu].pop(0))
        if self._given[gpu]:
            self._ready.append(gpu)


RULES: dict[str, type[Fifo] | type[Hashed] | type[Affinity]] = {
    "random": Fifo,
    "hashed": Hashed,
    "affinity": Affinity,
}


@dataclass(frozen=True)
class Figures:
    """What came of it, without the first third of the requests: shares of all requests, GB/s,
    and seconds."""

    same: float
    on_gpu: float
    on_disk: float
    fetched: float
    network: float
    busy: float
    wait_mean: float
    wait_p95: float
    wait_p99: float


def simulate(fleet: Fleet, name: str, seed: int = 0) -> Figures:
    """One run of a rule."""
    chance = np.random.default_rng(seed)
    rule: Rule = RULES[name](fleet, chance)
    disks = [Cache(fleet.on_disk) for _ in range(-(-fleet.gpus // HOST))]
    machines = [Machine(Cache(fleet.on_gpu), disks[gpu // HOST]) for gpu in range(fleet.gpus)]
    found: Counter[str] = Counter()
    waits: list[float] = []
    ends: list[tuple[float, int, Request]] = []
    now = busy = began = 0.0
    first = fleet.requests // 3
    for number, request in enumerate(_requests(fleet, chance)):
        while ends and ends[0][0] <= request.arrived:
            now, gpu, finished = heapq.heappop(ends)
            rule.done(gpu, finished)
            busy += _start(fleet, rule, machines, now, ends, found, waits)
        now = request.arrived
        if number == first:
            found.clear()
            waits.clear()
            busy, began = 0.0, now
        rule.put(request)
        busy += _start(fleet, rule, machines, now, ends, found, waits)
    count, seconds = sum(found.values()), now - began
    return Figures(
        same=found["same"] / count,
        on_gpu=found["gpu"] / count,
        on_disk=found["disk"] / count,
        fetched=found["network"] / count,
        network=found["network"] * fleet.lora_bytes / seconds / GB,
        busy=busy / seconds / fleet.gpus,
        wait_mean=float(np.mean(waits)),
        wait_p95=float(np.quantile(waits, 0.95)),
        wait_p99=float(np.quantile(waits, 0.99)),
    )


def _start(
    fleet: Fleet,
    rule: Rule,
    machines: list[Machine],
    now: float,
    ends: list[tuple[float, int, Request]],
    found: Counter[str],
    waits: list[float],
) -> float:
    """Start what the rule lets start; the seconds of GPUs that this takes."""
    taken = 0.0
    while chosen := rule.next():
        request, gpu = chosen
        machine = machines[gpu]
        kind, seconds = _lora(fleet, machine, request.key)
        found[kind] += 1
        waits.append(now - request.arrived + seconds)
        machine.last = request.key
        heapq.heappush(ends, (now + seconds + request.draw, gpu, request))
        taken += seconds + request.draw
    return taken


def _lora(fleet: Fleet, machine: Machine, key: int) -> tuple[str, float]:
    """Where a LoRA is found and what putting it on takes: a merge is 30 ms (SPEED.md)."""
    merge = 0.03
    if machine.last == key:
        return "same", 0.0
    on_gpu, on_disk = machine.gpu.use(key), machine.disk.use(key)
    if on_gpu:
        return "gpu", merge
    if on_disk:
        return "disk", merge + fleet.read
    return "network", merge + fleet.read + fleet.lora_bytes / fleet.network


def _requests(fleet: Fleet, chance: np.random.Generator) -> Iterator[Request]:
    """A Poisson stream that would keep `load` of the GPUs busy with drawing alone."""
    ranks = np.arange(1, fleet.loras + 1) ** -fleet.zipf
    keys = chance.choice(fleet.loras, size=fleet.requests, p=ranks / ranks.sum())
    rate = fleet.load * fleet.gpus / fleet.draw
    arrivals = np.cumsum(chance.exponential(1 / rate, fleet.requests))
    draws = chance.gamma(4.0, fleet.draw / 4, fleet.requests)
    for arrived, key, draw in zip(arrivals, keys, draws, strict=True):
        yield Request(float(arrived), int(key), float(draw))


HEAD = ("load", "Zipf", "rule", "merged", "on GPU", "on disk", "fetched", "GB/s", "GPU busy",
        "wait mean", "p95", "p99")  # fmt: skip


def row(fleet: Fleet, name: str, figures: Figures) -> str:
    """One line of the table."""
    f = figures
    shares = [f"{100 * share:.1f} %" for share in (f.same, f.on_gpu, f.on_disk, f.fetched)]
    waits = [f"{wait:.2f} s" for wait in (f.wait_mean, f.wait_p95, f.wait_p99)]
    cells = [f"{fleet.load:g}", f"{fleet.zipf:g}", name, *shares, f"{f.network:.1f}"]
    return " | ".join(["", *cells, f"{100 * f.busy:.0f} %", *waits, ""]).strip()


def main() -> None:
    """Print a table of docs/scale.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, default=Fleet.gpus)
    parser.add_argument("--requests", type=int, default=Fleet.requests)
    parser.add_argument("--zipf", type=float, help="one exponent instead of the table's cases")
    parser.add_argument("--load", type=float, default=Fleet.load, help="its load")
    args = parser.parse_args()
    cases = ((args.zipf, args.load),) if args.zipf else CASES
    print(" | ".join(["", *HEAD, ""]).strip())
    print("|" + " --- |" * len(HEAD))
    for zipf, load in cases:
        fleet = Fleet(gpus=args.gpus, requests=args.requests, zipf=zipf, load=load)
        for name in RULES:
            print(row(fleet, name, simulate(fleet, name)), flush=True)


if __name__ == "__main__":
    main()
