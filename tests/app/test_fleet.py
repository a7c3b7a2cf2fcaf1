"""Many replicas as one engine: real replicas with fake pipelines, in one loop."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import pytest

from klein.app import fleet as fleets
from klein.app import replica
from klein.app.account import CALLER
from klein.app.fleet import Fleet, FleetGenerator, ReplicaLost, lora_key
from klein.app.generator import Generated
from klein.app.replica import Hello, Message, Order, Replica
from klein.core import (
    GenerationResult,
    Job,
    PipelineStats,
    Preview,
    PreviewRequest,
    Progress,
    RequestContext,
)
from klein.engine.engine import State
from klein.entrypoints.http.app import standalone
from klein.errors import (
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    KleinError,
    LoraError,
    NotReady,
    QueueFull,
)
from klein.lora.spec import LoraSpec
from klein.output.images import read_text
from klein.output.response import encode
from klein.settings import Settings
from klein.sources.cache import StoreStats
from tests.support import fakes


@dataclass
class One:
    """A replica of the test; `alive` ends every call to it when it is unset."""

    replica: Replica
    pipeline: fakes.FakePipeline
    dead: asyncio.Event = field(default_factory=asyncio.Event)
    refuses: KleinError | None = None


class InLoop:
    """The way to replicas in the same process."""

    def __init__(self, *ids: str) -> None:
        self.replicas: dict[str, One] = {}
        self.sent: list[tuple[str, Order]] = []
        for id in ids:
            self.add(id)

    def add(self, id: str) -> One:
        pipeline = fakes.FakePipeline()
        one = One(Replica(id, id, fakes.generator(pipeline)), pipeline)
        self.replicas[id] = one
        return one

    async def draw(self, worker: str, order: Order) -> AsyncIterator[Message]:
        one = self.replicas.get(worker)
        self.sent.append((worker, order))
        if one is None or one.dead.is_set():
            raise ReplicaLost("it is not there")
        if one.refuses is not None:
            yield one.refuses
            return
        messages = one.replica.draw(order)
        dead = asyncio.create_task(one.dead.wait())
        while True:
            news = asyncio.ensure_future(anext(messages, None))
            await asyncio.wait({news, dead}, return_when=asyncio.FIRST_COMPLETED)
            if dead.done():
                news.cancel()
                raise ReplicaLost("it died")
            told = await news
            if told is None:
                dead.cancel()
                return
            yield told

    async def cancel(self, id: str) -> None:
        for one in self.replicas.values():
            one.replica.cancel(id)

    async def hello(self) -> list[Hello]:
        return [one.replica.hello() for one in self.replicas.values() if not one.dead.is_set()]


Scenario = Callable[[FleetGenerator, InLoop], Awaitable[None]]


def run(
    scenario: Scenario, *ids: str, ways: Callable[..., InLoop] = InLoop, **settings: str
) -> None:
    """Play a scenario with a fleet of the replicas `ids`."""

    async def play() -> None:
        there = ways(*ids)
        chosen = Settings.from_env(settings)
        fleet = Fleet(there, queue_size=chosen.queue_size).start()
        generator = FleetGenerator(fleet, fakes.FakeLibrary(), chosen, None)
        await until(lambda: len(fleet.load()) == len(ids))
        await scenario(generator, there)
        fleet.stop()
        assert fleet.state is State.STOPPED

    asyncio.run(play())


async def until(is_so: Callable[[], bool]) -> None:
    for _ in range(1000):
        if is_so():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never came to that")


def start(generator: FleetGenerator, **values: Any) -> "asyncio.Task[Generated]":
    return asyncio.create_task(generator.run(fakes.request(**values), generator.context()))


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleets, "HELLO_EVERY", 0.02)


def test_a_job_comes_back_as_if_it_were_drawn_here() -> None:
    """The same file as from one worker, with its parameters inside."""

    async def scenario(generator: FleetGenerator, ways: InLoop) -> None:
        asked = fakes.request(seed=7, loras=[{"path": "a.safetensors"}])
        got = await generator.run(asked, generator.context("r1"))
        alone = fakes.generator(fakes.FakePipeline())
        wanted = await alone.run(asked, alone.context("r1"))
        (ours,), (theirs,) = (encode(g.result, g.delivery, g.marks) for g in (got, wanted))
        assert ours == theirs
        assert "a portrait" in read_text(ours.data)
        assert got.result.loras == wanted.result.loras
        assert got.result.images[0].image.tobytes() == wanted.result.images[0].image.tobytes()

    run(scenario, "a")


def test_progress_and_previews_come_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress as often as PROGRESS_EVERY lets it."""
    monkeypatch.setattr(replica, "PROGRESS_EVERY", 0.0)

    async def scenario(generator: FleetGenerator, ways: InLoop) -> None:
        heard: list[Progress] = []
        seen: list[Preview] = []
        previews = PreviewRequest(seen.append, every=2, decoded=1)
        context = generator.context("r1", heard.append, previews)
        await generator.run(fakes.request(num_inference_steps=4), context)
        assert heard == [Progress(step, 4, 1, 1) for step in (1, 2, 3, 4)]
        assert [(p.step, p.decoded) for p in seen] == [(2, False), (2, True), (4, False)]

    run(scenario, "a")


@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        (LoraError("no such file"), LoraError),
        (InvalidRequest("width: no", field="width"), InvalidRequest),
        (RuntimeError("boom"), InternalError),
    ],
)
def test_errors_come_back_as_they_are(fault: Exception, seen: type[KleinError]) -> None:
    async def scenario(generator: FleetGenerator, ways: InLoop) -> None:
        ways.replicas["a"].pipeline.fail = fault
        with pytest.raises(seen) as raised:
            await start(generator)
        if seen is not InternalError:
            assert str(raised.value) == str(fault)
            assert raised.value.field == getattr(fault, "field", None)
        assert len(ways.sent) == 1

    run(scenario, "a")


def test_a_job_whose_replica_dies_is_drawn_by_another() -> None:
    """With the same seed, and its caller waits for one job."""

    async def scenario(generator: FleetGenerator, ways: InLoop) -> None:
        for one in ways.replicas.values():
            one.pipeline.gate.clear()
        job = start(generator)
        await until(lambda: any(one.pipeline.started.is_set() for one in ways.replicas.values()))
        (first, order), *_ = ways.sent
        ways.replicas[first].dead.set()
        await until(lambda: len(ways.sent) == 2)
        second, again = ways.sent[1]
        assert second != first
        assert again.resolved.params == order.resolved.params
        ways.replicas[second].pipeline.gate.set()
        got = await job
        assert got.result.params.seed == order.resolved.params.seed
        assert generator.fleet.routing.drawn_again == 1
        assert list(generator.fleet.load()) == [second]

    run(scenario, "a", "b")


def test_a_job_that_ends_every_replica_is_given_up() -> None:
    """After TRIES of them."""

    async def scenario(generator: FleetGenerator, ways: InLoop) -> None:
        async def draw(worker: str, order: Order) -> AsyncIterator[Message]:
            ways.sent.append((worker, order))
            raise ReplicaLost("it died")
            yield  # an async generator

        ways.draw = draw  # type: ignore[method-assign]
        with pytest.raises(NotReady):
            await start(generator)
        assert len(ways.sent) == fleets.TRIES
        assert generator.engine.stats().waiting == 0

    run(scenario, "a", "b", "c", "d")


def test_a_replica_that_falls_silent_loses_its_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its machine is gone, or its process stands still: nobody says so."""
    monkeypatch.setattr(fleets, "SILENCE", 0.1)

    async def scenario(generator: FleetGenerator, ways: InLoop) -> None:
        send = ways.draw

        async def draw(worker: str, order: Order) -> AsyncIterator[Message]:
            if worker == "a":
                ways.sent.append((worker, order))
                await asyncio.Event().wait()
            async for told in send(worker, order):
                yield told

        ways.draw = draw  # type: ignore[method-assign]
        jobs = [start(generator) for _ in range(3)]
        await asyncio.gather(*jobs)
        assert {worker for worker, _ in ways.sent} == {"a", "b"}
        assert len(ways.replicas["b"].pipeline.drawn) == 3

    run(scenario, "a", "b")


def test_progress_that_nobody_hears_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "PROGRESS_EVERY", 0.0)

    async def scenario(generator: FleetGenerator, ways: InLoop) -> None:
        send, sent = ways.draw, []

        async def draw(worker: str, order: Order) -> AsyncIterator[Message]:
            async for told in send(worker, order):
                sent.append(told)
                yield told

        ways.draw = draw  # type: ignore[method-assign]
        await start(generator)
        assert len(sent) == 1

    run(scenario, "a")


def test_a_job_that_waits_on_its_replica_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The replica says that it is still there, however long a step takes."""
    monkeypatch.setattr(fleets, "SILENCE", 0.2)
    monkeypatch.setattr(replica, "HEARTBEAT", 0.02)

    async def scenario(generator: FleetGenerator, ways: InLoop) -> None:
        pipeline = ways.replicas["a"].pipeline
        pipeline.gate.clear()
        jobs = [start(generator) for _ in range(2)]
        await asyncio.sleep(0.5)
        pipeline.gate.set()
        await asyncio.gather(*jobs)
        assert len(ways.sent) == 2
        assert generator.fleet.routing.drawn_again == 0

    run(scenario, "a")


def test_a_job_that_hangs_is_told_and_ends_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once its replica has ended itself; it is not drawn again."""
    monkeypatch.setattr(replica, "OVERTIME", 0.1)

    async def scenario(generator: FleetGenerator, ways: InLoop) -> None:
        one, ended = ways.replicas["a"], threading.Event()

        def hang(job: Job) -> GenerationResult:
            one.pipeline.started.set()
            ended.wait()
            raise RuntimeError("too late")

        one.pipeline.generate = hang  # type: ignore[method-assign]
        job = asyncio.create_task(
            generator.run(fakes.request(), RequestContext(time.monotonic() + 0.1))
        )
        await until(one.pipeline.started.is_set)
        assert not one.replica.hangs
        await until(lambda: one.replica.hangs)
        one.dead.set()
        with pytest.raises(DeadlineExceeded):
            await job
        assert len(ways.sent) == 1
        ended.set()

    run(scenario, "a")


def test_metrics_are_those_of_all_replicas() -> None:
    """Counts include those that are gone, memory and disks only those that there are."""

    async def scenario(generator: FleetGenerator, ways: InLoop) -> None:
        await until(lambda: len(generator.fleet.load()) == 3)
        both = generator.engine.pipeline.stats()
        assert (both.lora_switches, both.gpu_memory_free, both.gpu_memory_total) == (9, 30, 60)
        assert generator.fleet.store_stats() == StoreStats(hits=3, fetches=6, bytes=200)
        ways.replicas["c"].dead.set()
        await until(lambda: len(generator.fleet.load()) == 2)
        left = generator.engine.pipeline.stats()
        assert (left.lora_switches, left.gpu_memory_free, left.gpu_memory_total) == (9, 20, 40)
        assert generator.fleet.store_stats() == StoreStats(hits=3, fetches=6, bytes=100)

    class Counting(InLoop):
        async def hello(self) -> list[Hello]:
            stats = PipelineStats(lora_switches=3, gpu_memory_free=10, gpu_memory_total=20)
            store, host = StoreStats(1, 2, 100), {"a": "x", "b": "x", "c": "y"}
            return [
                replace(hello, host=host[hello.id], stats=stats, store=store)
                for hello in await super().hello()
            ]

    run(scenario, "a", "b", "c", ways=Counting)


def test_a_replica_that_is_being_replaced_gets_nothing() -> None:
    """Its refusal sends the job elsewhere."""

    async def scenario(generator: FleetGenerator, ways: InLoop) -> None:
        ways.replicas["a"].refuses = NotReady("it ran out of GPU memory twice")
        jobs = [start(generator) for _ in range(4)]
        await asyncio.gather(*jobs)
        assert len(ways.replicas["b"].pipeline.drawn) == 4

    run(scenario, "a", "b")


def test_jobs_wait_while_there_is_no_replica() -> None:
    """Once there was one: before that they are refused."""

    async def scenario(generator: FleetGenerator, ways: InLoop) -> None:
        with pytest.raises(NotReady, match="no replica"):
            await start(generator)
        assert generator.engine.state is State.LOADING
        one = ways.add("a")
        await until(lambda: generator.engine.state is State.READY)
        one.dead.set()
        await until(lambda: not generator.fleet.load())
        job = start(generator)
        await until(lambda: generator.engine.stats().waiting == 1)
        ways.add("b")
        await job

    run(scenario)


def test_a_full_queue_refuses_at_once() -> None:
    """Its size is that of what waits in front of all replicas."""

    async def scenario(generator: FleetGenerator, ways: InLoop) -> None:
        for one in ways.replicas.values():
            one.pipeline.gate.clear()
        jobs = [start(generator) for _ in range(4 + 2)]
        await until(lambda: generator.engine.stats().waiting == 2)
        with pytest.raises(QueueFull):
            await start(generator)
        view = generator.engine.queue()
        assert (len(view.running), len(view.waiting), view.workers) == (2, 4, 2)
        for one in ways.replicas.values():
            one.pipeline.gate.set()
        await asyncio.gather(*jobs)

    run(scenario, "a", "b", KLEIN_QUEUE_SIZE="2")


def test_callers_take_turns() -> None:
    """By the name of their keys."""

    async def scenario(generator: FleetGenerator, ways: InLoop) -> None:
        pipeline = ways.replicas["a"].pipeline
        pipeline.gate.clear()
        jobs = []
        for name, count in (("many", 8), ("few", 2)):
            CALLER.set(name)
            jobs += [start(generator, prompt=f"{name} {n}") for n in range(count)]
            await asyncio.sleep(0)
        await until(lambda: generator.engine.stats().waiting == 8)
        pipeline.gate.set()
        await asyncio.gather(*jobs)
        assert [prompt.split()[0] for prompt in pipeline.drawn[2:6]].count("few") == 2

    run(scenario, "a", KLEIN_QUEUE_SIZE="20")


def test_keys_take_turns_over_http() -> None:
    """A key with two jobs does not wait for all of one with many."""
    keys = {name: f"{name}-{'k' * 32}" for name in ("many", "few")}

    async def scenario(generator: FleetGenerator, ways: InLoop) -> None:
        pipeline = ways.replicas["a"].pipeline
        pipeline.gate.clear()
        transport = httpx.ASGITransport(standalone(generator))

        async def ask(name: str, prompt: str) -> int:
            headers = {"authorization": f"Bearer {keys[name]}"}
            answer = await client.post("/generate_json", json={"prompt": prompt}, headers=headers)
            return answer.status_code

        async with httpx.AsyncClient(transport=transport, base_url="http://klein") as client:
            asked = [asyncio.create_task(ask("many", "many")) for _ in range(8)]
            await until(lambda: generator.engine.stats().waiting == 6)
            asked += [asyncio.create_task(ask("few", "few")) for _ in range(2)]
            await until(lambda: generator.engine.stats().waiting == 8)
            pipeline.gate.set()
            assert await asyncio.gather(*asked) == [200] * 10
        assert pipeline.drawn[2:6].count("few") == 2

    listed = ",".join(f"{name}:{key}" for name, key in keys.items())
    run(scenario, "a", KLEIN_QUEUE_SIZE="20", KLEIN_API_KEYS=listed)


def test_one_key_may_keep_all_replicas_busy() -> None:
    """And half of the queue; the other half is for others."""

    async def scenario(generator: FleetGenerator, ways: InLoop) -> None:
        generator.share_places()
        for one in ways.replicas.values():
            one.pipeline.gate.clear()
        CALLER.set("many")
        jobs = [start(generator) for _ in range(2 * 2 + 2)]
        await until(lambda: generator.engine.stats().waiting == 2)
        with pytest.raises(QueueFull, match="many"):
            await start(generator)
        CALLER.set("few")
        jobs.append(start(generator))
        for one in ways.replicas.values():
            one.pipeline.gate.set()
        await asyncio.gather(*jobs)

    run(scenario, "a", "b", KLEIN_QUEUE_SIZE="4")


@pytest.mark.parametrize("place", ["drawn", "sent", "waiting"])
def test_cancelling_frees_the_place(place: str) -> None:
    """Wherever the job is, and the replica draws the next one."""

    async def scenario(generator: FleetGenerator, ways: InLoop) -> None:
        pipeline = ways.replicas["a"].pipeline
        pipeline.gate.clear()
        jobs = [start(generator, prompt=str(n)) for n in range(3)]
        await until(lambda: generator.engine.stats().waiting == 1 and pipeline.started.is_set())
        number = ["drawn", "sent", "waiting"].index(place)
        jobs[number].cancel()
        with pytest.raises(asyncio.CancelledError):
            await jobs[number]
        pipeline.gate.set()
        rest = [job for n, job in enumerate(jobs) if n != number]
        await asyncio.gather(*rest)
        assert sorted(pipeline.drawn) == sorted({"0", "1", "2"} - {str(number)})
        assert generator.fleet.load() == {"a": 0}

    run(scenario, "a")


@pytest.mark.parametrize("waits", [False, True])
def test_a_deadline_holds_everywhere(waits: bool) -> None:
    """In the queue as on a replica."""

    async def scenario(generator: FleetGenerator, ways: InLoop) -> None:
        pipeline = ways.replicas["a"].pipeline
        pipeline.gate.clear()
        others = [start(generator) for _ in range(2)] if waits else []
        context = RequestContext(time.monotonic() + 0.2)
        with pytest.raises(DeadlineExceeded):
            await generator.run(fakes.request(), context)
        pipeline.gate.set()
        await asyncio.gather(*others)

    run(scenario, "a")


def test_a_lost_job_that_was_cancelled_is_not_drawn_again() -> None:
    async def scenario(generator: FleetGenerator, ways: InLoop) -> None:
        for one in ways.replicas.values():
            one.pipeline.gate.clear()
        job = start(generator)
        await until(lambda: any(one.pipeline.started.is_set() for one in ways.replicas.values()))
        ways.cancel = _nothing  # type: ignore[method-assign]
        job.cancel()
        await asyncio.sleep(0.01)
        ways.replicas[ways.sent[0][0]].dead.set()
        with pytest.raises(asyncio.CancelledError):
            await job
        assert len(ways.sent) == 1
        for one in ways.replicas.values():
            one.pipeline.gate.set()

    run(scenario, "a", "b")


async def _nothing(id: str) -> None:
    return


def test_a_job_is_sent_in_a_context_of_its_own() -> None:
    """Not in that of the request that made room for it: Ray ends a request's calls with it."""
    mark: ContextVar[str] = ContextVar("mark", default="none")
    marks = []

    async def scenario(generator: FleetGenerator, ways: InLoop) -> None:
        send = ways.draw

        def draw(worker: str, order: Order) -> AsyncIterator[Message]:
            marks.append(mark.get())
            return send(worker, order)

        ways.draw = draw  # type: ignore[method-assign]
        mark.set("a request's")
        await asyncio.gather(*(start(generator) for _ in range(4)))

    run(scenario, "a")
    assert marks == ["none"] * 4


def test_what_is_warm_where_is_told() -> None:
    """And how many jobs found their LoRAs there."""

    async def scenario(generator: FleetGenerator, ways: InLoop) -> None:
        for name in ("x", "y", "y"):
            await start(generator, loras=[{"path": f"{name}.safetensors", "scale": 0.5}])
        warm = generator.fleet.warm()
        assert sorted(key for keys in warm.values() for key in keys) == [
            "x.safetensors",
            "y.safetensors",
        ]
        assert generator.fleet.routing.routed == {"cold": 2, "same": 1}

    run(scenario, "a", "b")


def test_a_set_of_loras_is_its_references() -> None:
    """Not their order, scales or tokens."""
    a, b = LoraSpec("a.safetensors", 0.5), LoraSpec("https://x.example/b.safetensors?token=secret")
    assert lora_key((a, b)) == lora_key((b, LoraSpec("a.safetensors", 1.0)))
    assert "secret" not in lora_key((b,))
    assert lora_key(()) == ""
    first, second = (LoraSpec("owner/repo", weight_name=name) for name in ("1", "2"))
    assert lora_key((first,)) != lora_key((second,))


def test_stopping_refuses() -> None:
    async def scenario(generator: FleetGenerator, ways: InLoop) -> None:
        generator.fleet.stop()
        with pytest.raises(NotReady, match="another worker"):
            await start(generator)

    run(scenario, "a")


def test_a_cancelled_order_says_so() -> None:
    """Also to a caller that did not cancel it: somebody else did."""

    async def scenario(generator: FleetGenerator, ways: InLoop) -> None:
        ways.replicas["a"].pipeline.gate.clear()
        job = start(generator)
        await until(ways.replicas["a"].pipeline.started.is_set)
        await ways.cancel(ways.sent[0][1].id)
        with pytest.raises(Cancelled):
            await job

    run(scenario, "a")
