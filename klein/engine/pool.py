"""Many workers and one queue: bounded, fair between callers, and which worker draws what.

The queue is ordered by start-time fair queueing: each caller's work follows its own, and callers
take turns by the work they ask for. A worker that is free takes the job nearest to the front of
those whose LoRA set it drew last, then of those it has warm, then of those that are warm nowhere,
then the first. How often a job is overtaken has a bound, PATIENCE. No worker gets a second job
while another has none: a warm worker with a queue loses its work to an idle one.

Nothing here waits or knows what a worker is: whoever owns a pool calls `next` when something
changed. Not thread-safe.
"""

import time
from bisect import insort
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Generic, Literal, TypeVar

from klein.errors import QueueFull

T = TypeVar("T")
Warmth = Literal["same", "warm", "cold"]

SLOTS = 2
"""Jobs a worker has at a time: one on its GPU, and one that gets ready meanwhile."""
WARM_SETS = 8
"""LoRA sets that a worker is taken to have at hand: those it drew last."""
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
class Worker(Generic[T]):
    """One worker: its jobs, the first of them on its GPU since `started`; `warm` are the LoRA sets
    it drew, the last one last."""

    id: str
    jobs: list[Entry[T]] = field(default_factory=list)
    started: float = 0.0
    warm: OrderedDict[str, None] = field(default_factory=OrderedDict)

    @property
    def last(self) -> str | None:
        """The LoRA set that its newest job needs."""
        return next(reversed(self.warm), None)

    def warmth(self, key: str) -> Warmth:
        """What putting the LoRAs `key` on would take here: nothing, a merge, or reading them."""
        return "same" if key == self.last else "warm" if key in self.warm else "cold"


class Pool(Generic[T]):
    """The workers, and the entries that wait for them in order."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.waiting: list[Entry[T]] = []
        self.workers: dict[str, Worker[T]] = {}
        self._free: tuple[dict[str, Worker[T]], ...] = tuple({} for _ in range(SLOTS))
        self._holders: dict[str, dict[str, Worker[T]]] = {}
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

    def members(self, ids: Iterable[str]) -> bool:
        """Set which workers get jobs; returns whether that changed anything. One that is not among
        `ids` finishes what it has."""
        wanted = dict.fromkeys(ids)
        gone = [id for id in self.workers if id not in wanted]
        for id in gone:
            self._forget(self.workers.pop(id))
        new = [id for id in wanted if id not in self.workers]
        for id in new:
            self.workers[id] = self._free[0][id] = Worker(id)
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

    def holders(self, key: str) -> Iterator[Worker[T]]:
        """The workers that have the LoRAs `key` warm."""
        return iter(self._holders.get(key, {}).values())

    # -- which worker draws what ---------------------------------------------------------------

    def _match(
        self, free: dict[str, Worker[T]], *, urgent: bool
    ) -> tuple[Entry[T], Worker[T]] | None:
        """Unless it is `urgent`, for no worker is idle, what is warm elsewhere waits for that."""
        head = self.waiting[0]
        if head.overtaken < PATIENCE * len(self.workers):
            near = list(islice(self.waiting, LOOKAHEAD))
            found = self._warm(near, free, last=True) or self._warm(near, free, last=False)
            cold = next((entry for entry in near if entry.key not in self._holders), None)
            if found or not (cold or urgent):
                return found
            head = cold or head
        warm = (worker for worker in self.holders(head.key) if worker.id in free)
        return head, next(warm, next(iter(free.values())))

    def _warm(
        self, entries: list[Entry[T]], free: dict[str, Worker[T]], *, last: bool
    ) -> tuple[Entry[T], Worker[T]] | None:
        """The first entry that a free worker has warm, or with `last` was given last."""
        for entry in entries:
            for worker in self.holders(entry.key):
                if worker.id in free and (not last or worker.last == entry.key):
                    return entry, worker
        return None

    def _give(self, entry: Entry[T], worker: Worker[T]) -> None:
        self._leave_level(worker)
        if not worker.jobs:
            worker.started = time.monotonic()
        worker.jobs.append(entry)
        self._enter_level(worker)
        worker.warm[entry.key] = None
        worker.warm.move_to_end(entry.key)
        self._holders.setdefault(entry.key, {})[worker.id] = worker
        if len(worker.warm) > WARM_SETS:
            self._unhold(worker, worker.warm.popitem(last=False)[0])

    def _leave_level(self, worker: Worker[T]) -> None:
        if len(worker.jobs) < SLOTS:
            self._free[len(worker.jobs)].pop(worker.id, None)

    def _enter_level(self, worker: Worker[T]) -> None:
        """A worker that left the pool is never free again."""
        if len(worker.jobs) < SLOTS and self.workers.get(worker.id) is worker:
            self._free[len(worker.jobs)][worker.id] = worker

    def _forget(self, worker: Worker[T]) -> None:
        self._leave_level(worker)
        for key in worker.warm:
            self._unhold(worker, key)

    def _unhold(self, worker: Worker[T], key: str) -> None:
        holders = self._holders[key]
        holders.pop(worker.id, None)
        if not holders:
            del self._holders[key]

    # -- whose turn it is ----------------------------------------------------------------------

    def _insert(self, entry: Entry[T]) -> None:
        insort(self.waiting, entry, key=lambda each: (each.start, each.number))

    def _turn(self, taken: Entry[T]) -> None:
        """Move the clock of work on to the first that waits, and forget callers that are behind."""
        self._now = max(self._now, self.waiting[0].start if self.waiting else taken.start)
        self._finish = {c: finish for c, finish in self._finish.items() if finish > self._now}
