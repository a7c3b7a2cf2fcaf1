import asyncio
import base64
import gc
import hashlib
import io
import json
import random
import re
import subprocess
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from starlette.types import ASGIApp, Receive, Scope, Send

from klein.app.job import Job as JobState
from klein.app.job import JobSpec
from klein.app.jobs import JobRegistry
from klein.core import GenerationResult, Job, Progress, Timings
from klein.entrypoints.http.app import connect, create_app
from klein.errors import LoraError
from tests.support import asgi, fakes

LAST = {"completed", "failed", "canceled"}


class PacedPipeline(fakes.FakePipeline):
    """Takes `pace` seconds for a step."""

    pace = 0.0

    def generate(self, job: Job) -> GenerationResult:
        tell = job.context.on_progress

        def on_progress(progress: Progress) -> None:
            time.sleep(self.pace)
            tell(progress)

        return super().generate(replace(job, context=replace(job.context, on_progress=on_progress)))


class TimedPipeline(PacedPipeline):
    """Says that every step took 20 ms and every decode 100."""

    def generate(self, job: Job) -> GenerationResult:
        result = super().generate(job)
        steps = job.params.num_inference_steps * job.params.num_images
        return replace(
            result, timings=Timings(denoise=0.02 * steps, decode=0.1 * job.params.num_images)
        )


def with_callers(app: ASGIApp) -> ASGIApp:
    """What authentication will do: the name of a caller's key in the request's state."""

    async def named(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            name = dict(scope["headers"]).get(b"x-test-caller")
            scope.setdefault("state", {})["caller"] = name.decode() if name else None
        await app(scope, receive, send)

    return named


@dataclass
class Event:
    id: int
    name: str
    data: dict[str, Any]


class Client(httpx.Client):
    """A caller of the jobs routes."""

    pipeline: PacedPipeline

    def start(self, **values: Any) -> str:
        """The id of a new job."""
        body = {"input": {"prompt": "x", "num_inference_steps": 4, **values}}
        answer = self.post("/jobs", json=body)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def job(self, id: str) -> dict[str, Any]:
        answer = self.get(f"/jobs/{id}")
        assert answer.status_code == 200
        job: dict[str, Any] = answer.json()
        return job

    def wait(self, id: str, *statuses: str) -> dict[str, Any]:
        """The job once its status is one of these."""
        ends = time.monotonic() + 10
        while (job := self.job(id))["status"] not in statuses:
            assert time.monotonic() < ends, job
            time.sleep(0.005)
        return job

    def ended(self, id: str) -> dict[str, Any]:
        return self.wait(id, "succeeded", "failed", "canceled")

    def events(self, id: str, after: int | None = None, most: int = 10_000) -> list[Event]:
        """What the stream sends after `after`; the connection is cut after `most` events."""
        headers = {} if after is None else {"last-event-id": str(after)}
        found: list[Event] = []
        with self.stream("GET", f"/jobs/{id}/events", headers=headers) as answer:
            if answer.status_code == 204:
                return []
            assert answer.headers["content-type"].startswith("text/event-stream")
            fields: dict[str, str] = {}
            for line in answer.iter_lines():
                if line:
                    name, _, value = line.partition(": ")
                    fields[name] = value
                elif "event" in fields:
                    found.append(
                        Event(int(fields["id"]), fields["event"], json.loads(fields["data"]))
                    )
                    fields = {}
                    if len(found) == most:
                        break
        return found


@contextmanager
def serving(pipeline: PacedPipeline | None = None, **settings: str) -> Iterator[Client]:
    """The jobs routes on a fake pipeline, on a real port."""
    pipeline = pipeline or PacedPipeline()
    generator = fakes.generator(pipeline, **settings)
    app = create_app()
    connect(app, generator)
    with asgi.serve(with_callers(app)) as url, Client(base_url=url, timeout=20) as client:
        client.pipeline = pipeline
        yield client
        pipeline.gate.set()
    generator.stop()


@pytest.fixture(scope="module")
def shared() -> Iterator[Client]:
    with serving(PacedPipeline()) as client:
        yield client


@pytest.fixture
def client(shared: Client) -> Client:
    """A server without jobs under way."""
    shared.pipeline.gate.set()
    shared.pipeline.fail, shared.pipeline.pace = None, 0.0
    for job in shared.get("/jobs?limit=100").json()["results"]:
        shared.ended(job["id"])
    shared.pipeline.drawn.clear()
    shared.pipeline.started.clear()
    return shared


def test_a_job_from_its_start_to_its_image(client: Client) -> None:
    """202 with Replicate's object, later the answer of generate_json with links to the images."""
    body = {"input": {"prompt": "x", "seed": 5, "num_images": 2, "output_format": "webp"}}
    answer = client.post("/jobs", json=body)
    made = answer.json()
    assert (answer.status_code, answer.headers["location"]) == (202, f"/jobs/{made['id']}")
    assert made["input"] == body["input"]
    assert (made["output"], made["error"], made["completed_at"]) == (None, None, None)
    assert made["urls"]["stream"] == f"/jobs/{made['id']}/events"
    job = client.ended(made["id"])
    assert job["status"] == "succeeded"
    assert [image["seed"] for image in job["output"]["images"]] == [5, 6]
    assert job["output"]["parameters"]["num_images"] == 2
    assert job["created_at"] <= job["started_at"] <= job["completed_at"]
    assert 0 < job["metrics"]["predict_time"] <= job["metrics"]["total_time"]
    for told in job["output"]["images"]:
        image = client.get(told["url"])
        assert image.headers["content-type"] == "image/webp"
        assert image.headers["x-klein-seed"] == str(told["seed"])
        assert hashlib.sha256(image.content).hexdigest() == told["sha256"]
        assert Image.open(io.BytesIO(image.content)).size == (256, 256)
    gone = client.get(f"/jobs/{made['id']}/images/2")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "not_found")


def test_images_in_the_answer_for_who_asks(client: Client) -> None:
    """`return_type: base64` puts them into the job, not into events and lists; a link that no
    bucket can give is refused."""
    id = client.start(return_type="base64")
    (image,) = client.ended(id)["output"]["images"]
    data = base64.b64decode(image["base64"])
    assert "url" not in image
    assert client.get(f"/jobs/{id}/images/0").content == data
    row = client.get("/jobs?limit=1").json()["results"][0]["output"]["images"][0]
    assert (row["url"], "base64" in row) == (f"/jobs/{id}/images/0", False)
    assert "base64" not in client.events(id)[-1].data["output"]["images"][0]
    answer = client.post("/jobs", json={"input": {"prompt": "x", "return_type": "url"}})
    assert (answer.status_code, answer.json()["error"]["field"]) == (400, "return_type")


def test_prefer_wait(client: Client) -> None:
    """200 for a job that ends in time, 202 for one that does not and goes on."""
    body = {"input": {"prompt": "x"}}
    answer = client.post("/jobs", json=body, headers={"prefer": "Wait=20"})
    assert (answer.status_code, answer.json()["status"]) == (200, "succeeded")
    assert answer.headers["preference-applied"] == "wait=20"
    client.pipeline.gate.clear()
    started = time.monotonic()
    answer = client.put("/jobs/wait-1", json=body, headers={"prefer": "respond-async, wait=1"})
    assert (answer.status_code, answer.json()["status"]) == (202, "processing")
    assert 0.9 < time.monotonic() - started < 5
    client.pipeline.gate.set()
    assert client.ended("wait-1")["status"] == "succeeded"
    for wrong in ("wait=0", "wait=61", "wait=soon", "wait="):
        answer = client.post("/jobs", json=body, headers={"prefer": wrong})
        assert (answer.status_code, answer.json()["error"]["field"]) == (400, "Prefer")


def test_put_is_idempotent(client: Client) -> None:
    """The same body is the same job, drawn once; another body is refused, and so is an odd id."""
    body = {"input": {"prompt": "once"}}
    first = client.put("/jobs/my_id-1", json=body)
    assert first.status_code == 202
    client.ended("my_id-1")
    again = client.put("/jobs/my_id-1", json=body)
    assert (again.status_code, again.json()["created_at"]) == (200, first.json()["created_at"])
    assert client.pipeline.drawn == ["once"]
    for other in ({"input": {"prompt": "twice"}}, {**body, "previews": False}):
        answer = client.put("/jobs/my_id-1", json=other)
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "conflict")
    for odd in ("a.b", "x" * 65, "ä"):
        assert client.put(f"/jobs/{odd}", json=body).status_code == 400


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "input"),
        ({"input": {"prompt": "x", "steps": 3}}, "input"),
        ({"input": {"prompt": "x", "seed": "5"}}, "input.seed"),
        ({"input": {"prompt": "x", "width": 16}}, "width"),
        ({"input": {"prompt": "x"}, "webhook": "no address"}, "webhook"),
        ({"input": {"prompt": "x"}, "webhook_events_filter": ["logs"]}, "webhook_events_filter.0"),
        ({"input": {"prompt": "x"}, "webhook": "https://example.com/"}, "webhook"),
        ({"input": {"prompt": "x"}, "version": "v1"}, "version"),
    ],
)
def test_what_is_refused(client: Client, body: dict[str, Any], field: str) -> None:
    """In klein's one shape, with the field; webhooks too where no secret would sign them."""
    before = len(client.get("/jobs?limit=100").json()["results"])
    answer = client.post("/jobs", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["field"] == field
    assert len(client.get("/jobs?limit=100").json()["results"]) == before


def test_cancelling(client: Client) -> None:
    """Running: the GPU is free at once. Queued: it is never drawn. Over: 409."""
    client.pipeline.gate.clear()
    running, queued, last = (client.start(prompt=name) for name in ("running", "queued", "last"))
    client.wait(running, "processing")
    for id in (queued, running):
        answer = client.post(f"/jobs/{id}/cancel")
        assert (answer.status_code, answer.json()["status"]) == (200, "canceled")
        assert answer.json()["error"] is None
        assert [e.name for e in client.events(id) if e.name in LAST] == ["canceled"]
    assert "predict_time" not in client.job(queued)["metrics"]
    client.pipeline.gate.set()
    assert client.ended(last)["status"] == "succeeded"
    assert client.pipeline.drawn == ["last"]
    for id in (last, running):
        answer = client.post(f"/jobs/{id}/cancel")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "conflict")
    assert client.post("/jobs/nothing/cancel").status_code == 404


def test_events_tell_everything(client: Client) -> None:
    """Positions in the queue, every step, previews as small images, and the whole job at last."""
    client.pipeline.gate.clear()
    first, second, third = client.start(), client.start(), client.start(num_inference_steps=8)
    client.wait(first, "processing")
    assert client.job(third)["queue_position"] == 2
    with client.stream("GET", f"/jobs/{third}/events") as answer:
        lines = answer.iter_lines()
        early = [next(lines) for _ in range(4)]
        client.post(f"/jobs/{second}/cancel")
        early += [next(lines) for _ in range(4)]
        client.pipeline.gate.set()
        text = "\n".join([*early, *lines])
    told = [
        (name, json.loads(data)) for name, data in re.findall(r"event: (\w+)\ndata: (.*)\n", text)
    ]
    statuses = [(data["status"], data["queue_position"]) for name, data in told if name == "status"]
    assert statuses[-3:] == [("starting", 2), ("starting", 1), ("processing", None)]
    steps = [data for name, data in told if name == "progress"]
    assert [data["step"] for data in steps] == list(range(1, 9))
    assert set(steps[0]) == {"step", "steps", "image", "images", "stage", "seconds_left"}
    previews = [data for name, data in told if name == "preview"]
    assert [data["step"] for data in previews] == [4, 8]
    data = base64.b64decode(previews[0]["url"].removeprefix("data:image/jpeg;base64,"))
    assert Image.open(io.BytesIO(data)).size == (32, 32)
    assert told[-1][0] == "completed"
    assert told[-1][1] == client.job(third)


def test_previews_can_be_left_out(client: Client) -> None:
    """With `previews: false`."""
    client.pipeline.gate.clear()
    body = {"input": {"prompt": "x", "num_inference_steps": 8}, "previews": False}
    id = client.post("/jobs", json=body).json()["id"]
    with client.stream("GET", f"/jobs/{id}/events") as answer:
        client.pipeline.gate.set()
        text = answer.read().decode()
    assert "event: progress" in text
    assert "event: preview" not in text


@pytest.mark.parametrize("seed", range(4))
def test_a_stream_that_is_killed_resumes(client: Client, seed: int) -> None:
    """However often and wherever: nothing is lost, nothing comes twice, and one event is last."""
    dice = random.Random(seed)
    client.pipeline.pace = 0.01
    id = client.start(num_inference_steps=14, num_images=2)
    received: list[Event] = []
    while not received or received[-1].name not in LAST:
        after = received[-1].id if received else None
        received += client.events(id, after, most=dice.randint(1, 5))
    whole = client.events(id)
    ids = [event.id for event in received]
    assert ids == sorted(set(ids))
    assert {e.id for e in whole} <= set(ids)
    assert [e for e in received if e.name != "preview"] == whole
    assert [e.name for e in received if e.name in LAST] == ["completed"]
    assert sum(e.name == "progress" for e in received) == 28
    assert client.events(id, ids[-1]) == []
    assert client.get(f"/jobs/{id}/events", headers={"last-event-id": "x"}).status_code == 400


def test_an_id_that_no_event_had_is_before_the_first(client: Client) -> None:
    """A browser that comes back after a restart, or to a new job, sends one; it would wait for
    ever for what has happened already."""
    client.pipeline.gate.clear()
    id = client.start()
    with ThreadPoolExecutor() as pool:
        following = pool.submit(client.events, id, 500)
        client.pipeline.started.wait(5)
        client.pipeline.gate.set()
        assert following.result()[-1].name == "completed"
    assert [event.name for event in client.events(id, 500)][-1] == "completed"


def test_a_job_goes_on_without_its_client(client: Client) -> None:
    """Who hangs up early finds the result later, with the rest of the events."""
    client.pipeline.gate.clear()
    id = client.start()
    assert client.events(id, most=1)
    client.pipeline.gate.set()
    assert client.ended(id)["status"] == "succeeded"
    assert client.events(id, after=1)[-1].name == "completed"


def test_a_job_that_fails(client: Client) -> None:
    """Says why in klein's shape, and of a fault inside klein nothing but where to look."""
    for raised, code in ((LoraError("no such LoRA"), "lora_failed"), (OSError("/x"), "internal")):
        client.pipeline.fail = raised
        id = client.start()
        job = client.ended(id)
        assert (job["status"], job["error"]["code"]) == ("failed", code)
        assert "/x" not in json.dumps(job)
        last = client.events(id)[-1]
        assert (last.name, last.data["error"]) == ("failed", job["error"])
        assert client.get(f"/jobs/{id}/images/0").status_code == 404


def test_owners_do_not_see_each_other(client: Client) -> None:
    """Not in lists, by id, through events, images or cancelling; an id is free for each of them."""
    body = {"input": {"prompt": "hers"}}
    hers, his = {"x-test-caller": "her"}, {"x-test-caller": "him"}
    assert client.put("/jobs/same", json=body, headers=hers).status_code == 202
    for path in ("", "/events", "/images/0"):
        for caller in (his, {}):
            assert client.get(f"/jobs/same{path}", headers=caller).status_code == 404
    assert client.post("/jobs/same/cancel", headers=his).status_code == 404
    assert client.get("/jobs", headers=his).json() == {"results": [], "next": None}
    other = {"input": {"prompt": "his"}}
    answer = client.put("/jobs/same", json=other, headers={**his, "prefer": "wait=20"})
    assert (answer.status_code, answer.json()["input"]["prompt"]) == (200, "his")
    (row,) = client.get("/jobs", headers=hers).json()["results"]
    assert row["input"] == body["input"]


def test_pages(client: Client) -> None:
    """Newest first, each job once."""
    caller = {"x-test-caller": "pager"}
    body = {"input": {"prompt": "x", "num_inference_steps": 1}}
    made = []
    for _ in range(5):
        answer = client.post("/jobs", json=body, headers={**caller, "prefer": "wait=20"})
        made.append(answer.json()["id"])
    found, link = [], "/jobs?limit=2"
    while link:
        page = client.get(link, headers=caller).json()
        assert len(page["results"]) <= 2
        found += [job["id"] for job in page["results"]]
        link = page["next"]
    assert found == made[::-1]
    assert client.get("/jobs?limit=0").json()["error"]["field"] == "limit"


def test_a_full_queue_and_the_estimates() -> None:
    """429 with the seconds until a place is free, null before the first result; who is refused
    leaves no job, and the same id works later."""
    pipeline = TimedPipeline()
    with serving(pipeline, KLEIN_QUEUE_SIZE="1") as client:
        pipeline.gate.clear()
        first, second = client.start(num_inference_steps=10), None
        client.wait(first, "processing")
        second = client.start()
        assert client.job(second)["seconds_left"] is None
        answer = client.put("/jobs/third", json={"input": {"prompt": "x"}})
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "5")
        assert answer.json()["error"]["code"] == "queue_full"
        assert client.get("/jobs/third").status_code == 404
        pipeline.gate.set()
        client.ended(second)
        pipeline.gate.clear()
        slow = {"input": {"prompt": "x", "num_inference_steps": 100, "num_images": 4}}
        id = client.put("/jobs/third", json=slow).json()["id"]
        client.wait(id, "processing")
        waiting = client.job(client.start(num_inference_steps=20))
        assert waiting["queue_position"] == 1
        # 400 steps and 4 decodes before it, 20 steps and 1 decode of its own
        assert waiting["seconds_left"] == pytest.approx(8.4 + 0.5, abs=0.4)
        answer = client.post("/jobs", json=slow)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "9")
        assert client.post(f"/jobs/{id}/cancel").status_code == 200
        pipeline.gate.set()
        events = client.events(waiting["id"])
        left = [event.data["seconds_left"] for event in events if event.name == "progress"]
        assert (left[0], left[-1]) == (pytest.approx(0.48), pytest.approx(0.1))


def test_images_give_way_to_newer_ones() -> None:
    """Beyond KLEIN_JOBS_KEEP_MB the oldest go, and the job says so; the newest's always stay."""
    with serving(PacedPipeline(noise=True), KLEIN_JOBS_KEEP_MB="1") as client:
        ids = []
        for _ in range(3):
            ids.append(client.start(num_images=4))
            images = client.ended(ids[-1])["output"]["images"]
        size = sum(image["bytes"] for image in images)
        assert 500_000 < size < 1_000_000
        jobs = [client.job(id) for id in ids]
        assert [job["data_removed"] for job in jobs] == [True, True, False]
        assert [client.get(f"/jobs/{id}/images/0").status_code for id in ids] == [404, 404, 200]
        assert "KLEIN_JOBS_KEEP_MB" in client.get(f"/jobs/{ids[0]}/images/0").text
        big = client.start(num_images=4, width=512, height=512)
        assert sum(image["bytes"] for image in client.ended(big)["output"]["images"]) > 1_000_000
        assert client.get(f"/jobs/{big}/images/3").status_code == 200


def test_jobs_are_kept_for_a_while() -> None:
    """Then they and their images are gone, and the id is free."""
    with serving(KLEIN_JOBS_KEEP_SECONDS="1") as client:
        kept = client.get("/capabilities").json()["jobs"]
        assert (kept["keep_seconds"], kept["keep_mb"]) == (1, 256)
        body = {"input": {"prompt": "x"}}
        assert client.put("/jobs/a", json=body, headers={"prefer": "wait"}).status_code == 200
        assert client.get("/jobs/a/images/0").status_code == 200
        time.sleep(1.1)
        for path in ("/jobs/a", "/jobs/a/images/0", "/jobs/a/events"):
            assert client.get(path).status_code == 404
        assert client.get("/jobs").json()["results"] == []
        assert client.put("/jobs/a", json={"input": {"prompt": "y"}}).status_code == 202


async def finished(registry: JobRegistry, owner: str | None) -> JobState:
    """A job of `owner` that is over."""
    job = await registry.create(owner, JobSpec(fakes.request(num_inference_steps=1, num_images=4)))
    await job.finished.wait()
    return job


def test_a_forgotten_job_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """From memory too, long before the end of the time it would have been kept for."""
    monkeypatch.setattr("klein.app.jobs.MAX_JOBS", 2)
    generator = fakes.generator(fakes.FakePipeline())

    async def scenario() -> list[bool]:
        registry = JobRegistry(generator)
        logs = [weakref.ref((await finished(registry, None)).events) for _ in range(5)]
        await asyncio.sleep(0.05)
        gc.collect()
        return [log() is not None for log in logs]

    assert asyncio.run(scenario()) == [False] * 3 + [True] * 2
    generator.stop()


def test_who_has_most_makes_room_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many jobs one caller makes, another's stay, and so do their images."""
    monkeypatch.setattr("klein.app.jobs.MAX_JOBS", 4)
    generator = fakes.generator(fakes.FakePipeline(noise=True), KLEIN_JOBS_KEEP_MB="2")

    async def scenario() -> None:
        registry = JobRegistry(generator)
        bob = await finished(registry, "bob")
        for _ in range(6):
            anna = await finished(registry, "anna")
        assert registry.page("bob", 10, None)[0] == [bob]
        assert len(registry.page("anna", 10, None)[0]) == 3
        assert 4 * bob.image_bytes > 2e6
        assert anna.image_bytes

    asyncio.run(scenario())
    generator.stop()


def test_open_streams_are_bounded() -> None:
    """For each key by itself; a stream that is closed frees its place."""
    with serving(KLEIN_EVENT_STREAMS="2") as client:
        client.pipeline.gate.clear()
        path = f"/jobs/{client.start()}/events"
        other = {"x-test-caller": "other"}
        client.put("/jobs/a", json={"input": {"prompt": "x"}}, headers=other)
        with client.stream("GET", path), client.stream("GET", path):
            refused = client.get(path)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
            assert "KLEIN_EVENT_STREAMS" in refused.json()["error"]["message"]
            with client.stream("GET", "/jobs/a/events", headers=other) as answer:
                assert answer.status_code == 200
        ends = time.monotonic() + 5
        status = 429
        while status == 429 and time.monotonic() < ends:
            with client.stream("GET", path) as answer:
                status = answer.status_code
        assert status == 200


def test_the_pages_examples_run(client: Client, tmp_path: Path) -> None:
    """Every command of docs/jobs.md, in order, in one shell."""
    page = (Path(__file__).parents[2] / "docs/jobs.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    assert len(blocks) >= 4
    script = "set -euo pipefail\n" + "\n".join(blocks)
    script = script.replace("http://localhost:3000", str(client.base_url).rstrip("/"))
    run = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    with Image.open(tmp_path / "zib.png") as image:
        assert image.size == (256, 256)
    assert "event: completed" in run.stdout
