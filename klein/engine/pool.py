"""Many workers and one queue: bounded, fair between callers, and which worker draws what.

The queue is ordered by start-time fair queueing: each caller's work follows its own, and callers
take turns by the work they ask for. A worker that is free takes the job nearest to the front of
those whose LoRA set it drew last, then of those it has warm, then of those that its host has on
disk, then of those that nobody has, then the first. How often a job is overtaken has a bound,
PATIENCE. No worker gets a second job while another has none: a warm worker with a queue loses its
work to an idle one.

Nothing here waits or knows what a worker is: whoever owns a pool calls `next` when something
changed. Not thread-safe.
"""

import time
from bisect import insort
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, Literal, TypeVar

from klein.errors import QueueFull

T = TypeVar("T")
Warmth = Literal["same", "warm", "near", "cold"]
"""Of a LoRA set on a worker: drawn last, at hand, on its host's disk, or to be fetched."""
WARMTHS: tuple[Warmth, ...] = ("same", "warm", "near", "cold")

SLOTS = 2
"""Jobs a worker has at a time: one on its GPU, and one that gets ready meanwhile."""
WARM_SETS = 8
"""LoRA sets that a worker is taken to have at hand: those it drew last."""
NEAR_SETS = 256
"""LoRA sets that a host is taken to have on its disk: those its workers drew last."""
PATIENCE = 12
"""Times that each worker may let a job be overtaken for the sake of warm LoRAs: nobody waits longer
for that than for as many jobs of a worker."""
LOOKAHEAD = 64
"""Jobs from the front among which a free worker looks for one that suits it."""


@dataclass(eq=False, slots=True)
class Entry(Generic[T]):
    """A job of `caller` that needs the LoRAs `key` and takes `cost`, in any unit of work."""

    item: T
    key: str
    caller: str | None = None
    cost: float = 1.0
    start: float = 0.0
    number: int = 0
    overtaken: int = 0
    tries: int = 0


@dataclass(eq=False, slots=True)
class Host(Generic[T]):
    """A machine whose workers share what they fetch; `near` are those LoRA sets, the last last."""

    name: str
    workers: dict[str, "Worker[T]"] = field(default_factory=dict)
    near: OrderedDict[str, None] = field(default_factory=OrderedDict)


@dataclass(eq=False, slots=True)
class Worker(Generic[T]):
    """One worker: its jobs, the first of them on its GPU since `started`; `warm` are the LoRA sets
    it drew, the last one last."""

    id: str
    host: Host[T]
    jobs: list[Entry[T]] = field(default_factory=list)
    started: float = 0.0
    warm: OrderedDict[str, None] = field(default_factory=OrderedDict)

    def warmth(self, key: str) -> Warmth:
        """What putting the LoRAs `key` on would take here: nothing, a merge, a file, a network."""
        if key in self.warm:
            return "same" if key == next(reversed(self.warm)) else "warm"
        return "near" if key in self.host.near else "cold"


class Pool(Generic[T]):
    """The workers, and the entries that wait for them in order."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.waiting: list[Entry[T]] = []
        self.workers: dict[str, Worker[T]] = {}
        self._free: tuple[dict[str, Worker[T]], ...] = tuple({} for _ in range(SLOTS))
        self._hosts: dict[str, Host[T]] = {}
        self._holders: dict[str, dict[str, Host[T]]] = {}
        self._warm: Counter[str] = Counter()
        self._finish: dict[str | None, float] = {}
        self._now = 0.0
        self._numbers = count()

    def require_place(self) -> None:
        """Raises QueueFull."""
        if len(self.waiting) >= self.size:
            raise QueueFull(
                f"{self.size} jobs are waiting already: try again later, or raise KLEIN_QUEUE_SIZE"
            )

    def put(self, entry: Entry[T]) -> None:
        """Let `entry` wait for its turn; raises QueueFull."""
        self.require_place()
        entry.start = max(self._now, self._finish.get(entry.caller, 0.0))
        entry.number = next(self._numbers)
        self._finish[entry.caller] = entry.start + entry.cost
        self._insert(entry)

    def put_back(self, entry: Entry[T]) -> None:
        """Let an entry whose worker is gone wait where it waited before."""
        self._insert(entry)

    def remove(self, entry: Entry[T]) -> bool:
        """Take out an entry that waits; False for one that does not."""
        if entry not in self.waiting:
            return False
        self.waiting.remove(entry)
        return True

    def members(self, hosts: Mapping[str, str]) -> bool:
        """Set which workers get jobs, each with its host's name; returns whether that changed
        anything. One that is not among them finishes what it has."""
        gone = [id for id in self.workers if id not in hosts]
        for id in gone:
            self._leave(self.workers.pop(id))
        new = [id for id in hosts if id not in self.workers]
        for id in new:
            host = self._hosts.setdefault(hosts[id], Host(hosts[id]))
            self.workers[id] = host.workers[id] = self._free[0][id] = Worker(id, host)
        return bool(gone or new)

    def next(self) -> tuple[Entry[T], Worker[T], Warmth] | None:
        """The next job for a free worker, which has it from now on; None when there is none."""
        busy, free = next(((n, level) for n, level in enumerate(self._free) if level), (0, {}))
        found = self._match(free, urgent=busy == 0) if free and self.waiting else None
        if found is None:
            return None
        entry, worker = found
        for passed in self.waiting[: self.waiting.index(entry)]:
            passed.overtaken += 1
        self.waiting.remove(entry)
        self._turn(entry)
        warmth = worker.warmth(entry.key)
        self._give(entry, worker)
        return entry, worker, warmth

    def done(self, entry: Entry[T], worker: Worker[T]) -> None:
        """`worker` has finished with `entry`, or lost it."""
        self._leave_level(worker)
        worker.jobs.remove(entry)
        worker.started = time.monotonic()
        self._enter_level(worker)

    # -- which worker draws what ---------------------------------------------------------------

    def _match(
        self, free: dict[str, Worker[T]], *, urgent: bool
    ) -> tuple[Entry[T], Worker[T]] | None:
        """Unless it is `urgent`, for no worker is idle, what others have warm waits for them."""
        head, near = self.waiting[0], self.waiting[:LOOKAHEAD]
        if head.overtaken < PATIENCE * len(self.workers):
            found = self._suiting(near, free)
            if found or not urgent:
                return found
        having = {worker.warmth(head.key): worker for worker in self._having(head.key, free)}
        best = next((having[warmth] for warmth in WARMTHS if warmth in having), None)
        return head, best or next(iter(free.values()))

    def _suiting(
        self, entries: list[Entry[T]], free: dict[str, Worker[T]]
    ) -> tuple[Entry[T], Worker[T]] | None:
        """The first entry that a free worker was given last; else that it has warm; else that
        nobody has warm, for a worker whose host has it, or else for any."""
        best: dict[Warmth, tuple[Entry[T], Worker[T]]] = {}
        for entry in entries:
            for worker in self._having(entry.key, free):
                warmth = worker.warmth(entry.key)
                if warmth == "same":
                    return entry, worker
                if warmth == "warm" or not self._warm[entry.key]:
                    best.setdefault(warmth, (entry, worker))
            if entry.key not in self._holders:
                best.setdefault("cold", (entry, next(iter(free.values()))))
        return best.get("warm") or best.get("near") or best.get("cold")

    def _having(self, key: str, free: dict[str, Worker[T]]) -> Iterator[Worker[T]]:
        """The free workers whose hosts have the LoRAs `key`."""
        hosts = self._holders.get(key, {})
        if len(free) <= len(hosts):
            yield from (worker for worker in free.values() if worker.host.name in hosts)
            return
        for host in hosts.values():
            yield from (worker for id, worker in host.workers.items() if id in free)

    def _give(self, entry: Entry[T], worker: Worker[T]) -> None:
        self._leave_level(worker)
        if not worker.jobs:
            worker.started = time.monotonic()
        worker.jobs.append(entry)
        self._enter_level(worker)
        if entry.key not in worker.warm:
            self._warm[entry.key] += 1
        if dropped := _use(worker.warm, entry.key, WARM_SETS):
            self._cool(dropped)
        host = worker.host
        self._holders.setdefault(entry.key, {})[host.name] = host
        if dropped := _use(host.near, entry.key, NEAR_SETS):
            self._unhold(host, dropped)

    def _leave_level(self, worker: Worker[T]) -> None:
        if len(worker.jobs) < SLOTS:
            self._free[len(worker.jobs)].pop(worker.id, None)

    def _enter_level(self, worker: Worker[T]) -> None:
        """A worker that left the pool is never free again."""
        if len(worker.jobs) < SLOTS and self.workers.get(worker.id) is worker:
            self._free[len(worker.jobs)][worker.id] = worker

    def _leave(self, worker: Worker[T]) -> None:
        """Its host is forgotten with its last worker."""
        self._leave_level(worker)
        for key in worker.warm:
            self._cool(key)
        host = worker.host
        del host.workers[worker.id]
        if not host.workers:
            del self._hosts[host.name]
            for key in host.near:
                self._unhold(host, key)

    def _cool(self, key: str) -> None:
        self._warm[key] -= 1
        if not self._warm[key]:
            del self._warm[key]

    def _unhold(self, host: Host[T], key: str) -> None:
        holders = self._holders[key]
        del holders[host.name]
        if not holders:
            del self._holders[key]

    # -- whose turn it is ----------------------------------------------------------------------

    def _insert(self, entry: Entry[T]) -> None:
        insort(self.waiting, entry, key=lambda each: (each.start, each.number))

    def _turn(self, taken: Entry[T]) -> None:
        """Move the clock of work on to the first that waits, and forget callers that are behind."""
        self._now = max(self._now, self.waiting[0].start if self.waiting else taken.start)
        self._finish = {c: finish for c, finish in self._finish.items() if finish > self._now}


def _use(kept: OrderedDict[str, None], key: str, most: int) -> str | None:
    """Note that `key` was used last; the one that is forgotten for it, if any."""
    kept[key] = None
    kept.move_to_end(key)
    return kept.popitem(last=False)[0] if len(kept) > most else None
