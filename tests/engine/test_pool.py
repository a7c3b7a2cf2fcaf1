"""Whose turn it is, and which worker draws what."""

from itertools import pairwise

import pytest

from klein.engine.pool import LOOKAHEAD, PATIENCE, SLOTS, WARM_SETS, Entry, Pool, Worker
from klein.errors import QueueFull

Given = tuple[Entry[str], Worker[str]]


def pool(*workers: str, size: int = 1000) -> Pool[str]:
    """Each on its own host; "a1" and "a2" are both on host "a"."""
    made: Pool[str] = Pool(size)
    made.members(hosts(*workers))
    return made


def hosts(*workers: str) -> dict[str, str]:
    return {worker: worker[0] for worker in workers}


def put(pool: Pool[str], key: str = "", caller: str | None = None, cost: float = 1) -> Entry[str]:
    entry = Entry(f"{caller}/{key}", key, caller, cost)
    pool.put(entry)
    return entry


def take(pool: Pool[str]) -> Given:
    found = pool.next()
    assert found
    return found[:2]


def drain(pool: Pool[str]) -> list[tuple[str, str]]:
    """(worker, item) of everything that waits, in the order in which it is drawn when every
    worker takes equally long."""
    drawn, busy = [], []
    while True:
        while found := pool.next():
            busy.append(found[:2])
            drawn.append((found[1].id, found[0].item))
        if not busy:
            return drawn
        pool.done(*busy.pop(0))


def test_a_full_queue_refuses() -> None:
    """What a worker has does not count."""
    small = pool("a", size=2)
    for _ in range(SLOTS):
        put(small)
        take(small)
    put(small)
    put(small)
    with pytest.raises(QueueFull, match="KLEIN_QUEUE_SIZE"):
        put(small)


def test_callers_take_turns_by_the_work_they_ask_for() -> None:
    """One that comes later waits for one job of the other, not for fifty; one whose jobs are
    twice as large gets half as many."""
    one = pool("a")
    for _ in range(50):
        put(one, caller="many")
    for _ in range(3):
        put(one, caller="few")
    order = [item.split("/")[0] for _, item in drain(one)]
    assert order[:6] == ["many", "few"] * 3
    for _ in range(6):
        put(one, caller="large", cost=2)
        put(one, caller="small", cost=1)
    first = [item.split("/")[0] for _, item in drain(one)][:6]
    assert (first.count("large"), first.count("small")) == (2, 4)


def test_an_idle_caller_saves_no_turns_up() -> None:
    """Who was away competes from now on."""
    one = pool("a")
    for _ in range(20):
        put(one, caller="old")
        drain(one)
    put(one, caller="new")
    drain(one)
    for _ in range(4):
        put(one, caller="new")
        put(one, caller="old")
    order = [item.split("/")[0] for _, item in drain(one)]
    assert order[:4].count("old") == 2


def test_loras_go_where_they_are_warm() -> None:
    """Two workers share six sets out among them and draw each set's jobs together."""
    two = pool("a", "b")
    for n in range(60):
        put(two, key=f"lora{n % 6}")
    drawn = drain(two)
    where = {
        key: {worker for worker, item in drawn if item.endswith(key)}
        for _, key in [item.split("/") for _, item in drawn]
    }
    assert all(len(workers) == 1 for workers in where.values())
    switches = 0
    for worker in "ab":
        keys = [item for id, item in drawn if id == worker]
        switches += sum(a != b for a, b in pairwise(keys))
    assert switches <= 8  # 50 if they were drawn as they came


def test_an_idle_worker_takes_what_is_warm_at_a_busy_one() -> None:
    """A queue costs more than a LoRA."""
    two = pool("a", "b")
    put(two, key="x")
    first, busy = take(two)
    put(two, key="x")
    _, other = take(two)
    assert {busy.id, other.id} == {"a", "b"}
    two.done(first, busy)
    put(two, key="x")
    assert take(two)[1] is busy


def test_no_worker_gets_a_second_job_while_another_has_none() -> None:
    """Then each gets one more to get ready, and no third."""
    three = pool("a", "b", "c")
    for _ in range(9):
        put(three, key="x")
    given = [take(three)[1].id for _ in range(3 * SLOTS)]
    assert sorted(given[:3]) == ["a", "b", "c"]
    assert sorted(given[3:]) == ["a", "b", "c"]
    assert three.next() is None


def test_what_is_warm_elsewhere_waits_while_nobody_is_idle() -> None:
    """Its worker will be free soon, and nobody loses time."""
    two = pool("a", "b")
    put(two, key="x")
    first, a = take(two)
    put(two, key="y")
    second, b = take(two)
    put(two, key="x")
    put(two, key="x")
    assert take(two)[1] is a
    assert two.next() is None  # b has a job, and x is a's
    two.done(second, b)
    assert take(two)[1] is b  # b is idle
    two.done(first, a)


def test_nobody_is_overtaken_for_ever() -> None:
    """A stream of jobs for a warm LoRA lets the others through."""
    one = pool("a")
    put(one, key="hot")
    running = take(one)
    cold = put(one, key="cold")
    for _ in range(PATIENCE):
        put(one, key="hot")
        given = take(one)
        assert given[0].key == "hot"
        one.done(*running)
        running = given
    put(one, key="hot")
    assert take(one)[0] is cold


def test_only_the_front_is_searched() -> None:
    """However long the queue is."""
    one = pool("a")
    put(one, key="hot")
    take(one)
    for n in range(LOOKAHEAD):
        put(one, key=f"cold{n}")
    put(one, key="hot")
    assert take(one)[0].key == "cold0"


def test_a_worker_has_its_last_sets_warm() -> None:
    """Older ones are on its host's disk, and all are forgotten with the host."""
    one = pool("a")
    for n in range(WARM_SETS + 2):
        put(one, key=f"lora{n}")
        one.done(*take(one))
    (worker,) = one.workers.values()
    assert list(worker.warm) == [f"lora{n}" for n in range(2, WARM_SETS + 2)]
    found = [worker.warmth(f"lora{n}") for n in (WARM_SETS + 1, 2, 0, 99)]
    assert found == ["same", "warm", "near", "cold"]
    one.members({})
    one.members(hosts("a"))
    assert one.workers["a"].warmth("lora2") == "cold"


def test_a_host_forgets_what_it_had_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The set used longest ago, once there are too many."""
    monkeypatch.setattr("klein.engine.pool.NEAR_SETS", 2)
    monkeypatch.setattr("klein.engine.pool.WARM_SETS", 1)
    one = pool("a")
    for name in "xyxz":
        put(one, key=name)
        one.done(*take(one))
    assert [one.workers["a"].warmth(name) for name in "xyz"] == ["near", "cold", "same"]


def test_a_neighbour_has_what_its_host_fetched() -> None:
    """Before a worker of another host, but after one that has it warm."""
    four = pool("b1", "a1", "a2", "b2")
    put(four, key="x")
    first, warm = take(four)
    put(four, key="x")
    second, neighbour = take(four)
    assert warm.host is neighbour.host
    four.done(first, warm)
    put(four, key="x")
    assert take(four)[1] is warm
    four.done(second, neighbour)


def test_a_worker_that_leaves_gets_nothing_more() -> None:
    """It finishes what it has; a job it was lost with waits at its old place."""
    two = pool("a", "b")
    entries = [put(two, caller=str(n)) for n in range(2 * SLOTS + 2)]
    given = [take(two) for _ in range(2 * SLOTS)]
    leaving = given[0][1]
    assert two.members(hosts("b" if leaving.id == "a" else "a"))
    assert not two.members(hosts("b" if leaving.id == "a" else "a"))
    lost = [entry for entry, worker in given if worker is leaving]
    for entry in lost:
        two.done(entry, leaving)
        two.put_back(entry)
    assert two.next() is None
    assert two.waiting == [*lost, *entries[-2:]]
    for entry, worker in given:
        if worker is not leaving:
            two.done(entry, worker)
    assert take(two)[0] is lost[0]


def test_what_waits_can_be_taken_out() -> None:
    one = pool()
    entry = put(one)
    assert one.remove(entry)
    assert not one.remove(entry)
