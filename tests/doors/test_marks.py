"""Every door marks, filters and withholds alike: one generator behind all of them."""

import asyncio
import base64
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import httpx
import pytest

from klein.app import build
from klein.app.filter import NO_PREVIEWS
from klein.app.generator import Generator
from klein.core import GenerationResult, Job, Progress
from klein.entrypoints import runpod
from klein.entrypoints.cli.main import main
from klein.entrypoints.http.app import standalone
from klein.errors import InvalidRequest
from klein.output.images import read_text
from klein.output.marks import DRAWN, EDITED
from tests.support import asgi, fakes, filters, marks, pictures

FILTER = {"KLEIN_FILTER": "tests.support.filters:judge"}
PREVIEWING = ("stream", "job", "runpod")


class PacedPipeline(fakes.FakePipeline):
    """Takes a moment for every step, so that previews find their way out."""

    def generate(self, job: Job) -> GenerationResult:
        tell = job.context.on_progress

        def on_progress(progress: Progress) -> None:
            time.sleep(0.01)
            tell(progress)

        return super().generate(replace(job, context=replace(job.context, on_progress=on_progress)))


@dataclass
class Server:
    """A generator, behind HTTP and as the worker of a platform that notes what it is sent."""

    client: httpx.Client
    generator: Generator
    pipeline: PacedPipeline


@dataclass
class Drawn:
    """Finished images as files, those sent on the way, and klein's answer around them."""

    files: list[bytes]
    previews: list[bytes]
    told: dict[str, Any]


class Refused(Exception):
    """A code and where there is one a status."""


@contextmanager
def serving(**settings: str) -> Iterator[Server]:
    pipeline = PacedPipeline()
    generator = fakes.generator(pipeline, **settings)
    with (
        asgi.serve(standalone(generator)) as url,
        httpx.Client(base_url=url, timeout=20) as client,
    ):
        yield Server(client, generator, pipeline)
    generator.stop()


@pytest.fixture(scope="module")
def plain() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def private() -> Iterator[Server]:
    with serving(KLEIN_METADATA="none", KLEIN_AI_MARK="off", **FILTER) as server:
        yield server


# -- the doors -------------------------------------------------------------------------------------


def _decoded(text: str) -> bytes:
    """Of base64 or a data URI."""
    return base64.b64decode(text.rsplit(",", 1)[-1])


def _post(server: Server, path: str, body: dict[str, Any]) -> httpx.Response:
    answer = server.client.post(path, json=body)
    if answer.is_error:
        raise Refused(answer.json()["error"]["code"], answer.status_code)
    return answer


def _events(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


def generate(server: Server, asked: dict[str, Any]) -> Drawn:
    return Drawn([_post(server, "/generate", asked).content], [], {})


def generate_json(server: Server, asked: dict[str, Any]) -> Drawn:
    told = _post(server, "/generate_json", asked).json()
    return Drawn([_decoded(each["base64"]) for each in told["images"]], [], told)


def openai(server: Server, asked: dict[str, Any]) -> Drawn:
    told = _post(server, "/v1/images/generations", asked).json()
    return Drawn([_decoded(each["b64_json"]) for each in told["data"]], [], told["klein"])


def stream(server: Server, asked: dict[str, Any]) -> Drawn:
    body = asked | {"stream": True, "partial_images": 2}
    events = list(_events(_post(server, "/v1/images/generations", body).text.splitlines()))
    done = [each for each in events if each["type"].endswith("completed")]
    partial = [_decoded(each["b64_json"]) for each in events if each not in done]
    return Drawn([_decoded(each["b64_json"]) for each in done], partial, done[0]["klein"])


def job(server: Server, asked: dict[str, Any]) -> Drawn:
    server.pipeline.gate.clear()
    urls = _post(server, "/jobs", {"input": asked}).json()["urls"]
    previews: list[bytes] = []
    with server.client.stream("GET", urls["stream"]) as answer:
        server.pipeline.gate.set()
        for event in _events(answer.iter_lines()):
            if "url" in event:
                previews.append(_decoded(event["url"]))
    ended = server.client.get(urls["get"]).json()
    if ended["error"]:
        raise Refused(ended["error"]["code"])
    links = [each["url"] for each in ended["output"]["images"]]
    return Drawn([server.client.get(url).content for url in links], previews, ended["output"])


def runpod_worker(server: Server, asked: dict[str, Any]) -> Drawn:
    updates: list[dict[str, Any]] = []

    async def send(_: Any, update: dict[str, Any]) -> None:
        updates.append(update)

    worker = runpod.Worker(server.generator, send)
    told = asyncio.run(worker.handle({"id": "a", "input": asked | {"progress": "previews"}}))
    if "error" in told:
        assert told["error"].startswith(f"{told['code']}: ")
        raise Refused(told["code"])
    previews = [_decoded(each["preview"]) for each in updates if "preview" in each]
    return Drawn([_decoded(each["base64"]) for each in told["images"]], previews, told)


HTTP: dict[str, Callable[[Server, dict[str, Any]], Drawn]] = {
    "generate": generate,
    "generate_json": generate_json,
    "openai": openai,
    "stream": stream,
    "job": job,
    "runpod": runpod_worker,
}
doors = pytest.mark.parametrize("name", HTTP)


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runpod, "PROGRESS_EVERY", 0.01)


def _asked(prompt: str = "my secret", **values: Any) -> dict[str, Any]:
    return {"prompt": prompt, "seed": 1, "num_inference_steps": 12, **values}


# -- what they have in common ----------------------------------------------------------------------


@doors
def test_every_door_marks(plain: Server, name: str) -> None:
    """The finished image and those on the way, by what was asked."""
    reference = pictures.text(pictures.noise(64, 64))
    edit = {"images": [reference]}
    for asked, source in ((_asked(), DRAWN), (_asked() | edit, EDITED)):
        drawn = HTTP[name](plain, asked)
        assert bool(drawn.previews) is (name in PREVIEWING)
        assert {marks.source_type(each) for each in drawn.files + drawn.previews} == {source}
        assert "my secret" in read_text(drawn.files[0])
        if drawn.told:
            assert drawn.told["marks"]["digital_source_type"] == source
            assert drawn.told["filter"] is None


@doors
def test_every_door_keeps_to_the_settings(
    private: Server, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """No mark, no prompt in the file or the log, no previews that nobody judged, and the answer
    says all of it."""
    with caplog.at_level(logging.DEBUG):
        drawn = HTTP[name](private, _asked())
    assert "request" in caplog.text
    assert "my secret" not in caplog.text
    (data,) = drawn.files
    assert drawn.previews == []
    assert marks.source_type(data) is None
    with pytest.raises(InvalidRequest, match="no generation parameters"):
        read_text(data)
    if drawn.told:
        assert drawn.told["marks"]["metadata"] == "none"
        assert drawn.told["filter"]["name"] == FILTER["KLEIN_FILTER"]
        assert (NO_PREVIEWS in drawn.told["warnings"]) is (name in ("stream", "runpod"))


@doors
def test_every_door_refuses(private: Server, name: str) -> None:
    """A prompt, and an image that is the only one."""
    for values in (_asked("bad"), _asked(seed=2)):
        with pytest.raises(Refused) as caught:
            HTTP[name](private, values)
        assert caught.value.args in (("refused_by_filter", 422), ("refused_by_filter",))


@pytest.mark.parametrize("name", [name for name in HTTP if name != "generate"])
def test_every_door_leaves_the_others(private: Server, name: str) -> None:
    """Of a batch, and says which is missing."""
    drawn = HTTP[name](private, _asked(num_images=3))
    assert len(drawn.files) == 2
    assert [each["seed"] for each in drawn.told["filter"]["refused"]] == [2]


def test_a_broken_filter_is_told_as_a_fault_of_the_server(private: Server) -> None:
    """Which can pass; OpenAI's client is not to pay for it three times."""
    answer = private.client.post("/v1/images/generations", json=_asked("fail-late"))
    assert answer.status_code == 503
    assert answer.headers["x-should-retry"] == "false"
    assert answer.json()["error"]["code"] == "filter_failed"


def test_capabilities_say_what_is_in_force(plain: Server, private: Server) -> None:
    """Before anybody asks for an image."""
    told = [server.client.get("/capabilities").json() for server in (plain, private)]
    assert told[0]["marks"] == {"ai": True, "c2pa": False, "metadata": "full"}
    assert told[1]["marks"] == {"ai": False, "c2pa": False, "metadata": "none"}
    assert told[0]["filter"] is None
    assert told[1]["filter"] == {
        "name": FILTER["KLEIN_FILTER"],
        "seconds": 30,
        "previews": False,
        "threads": 4,
        "hanging": 0,
    }


def test_a_server_whose_filter_hangs_says_that_it_is_not_ready() -> None:
    """Whoever asks sends work elsewhere, and RunPod another worker, until a call ends."""
    filters.released.clear()
    with serving(KLEIN_FILTER_SECONDS="0.1", **FILTER) as server:
        for _ in range(4):
            with pytest.raises(Refused, match="filter_failed"):
                generate(server, _asked("hang"))
        ping = server.client.get("/ping")
        assert (ping.status_code, ping.json()) == (503, {"status": "filter_hangs"})
        worker = runpod.Worker(server.generator, AsyncMock())
        assert asyncio.run(worker.handle({"input": {}}))["refresh_worker"]
        filters.released.set()
        for _ in range(100):
            if server.client.get("/ping").status_code == 200:
                break
            time.sleep(0.01)
        assert server.client.get("/ping").json() == {"status": "ready"}
        assert "refresh_worker" not in asyncio.run(worker.handle({"input": {}}))


# -- the command line ------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """klein on the fake pipeline, with settings."""
    monkeypatch.setattr(build, "loader", lambda *_: fakes.FakePipeline)
    monkeypatch.setattr(build, "library", lambda *_: fakes.FakeLibrary())

    def run(*argv: Any, **settings: str) -> int:
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        return main([str(arg) for arg in argv])

    return run


def test_the_command_line_does_as_the_others(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Marks, keeps the prompt to itself, refuses with its code, and tells of each image."""
    out = tmp_path / "a.png"
    asked = ("-o", out, "--seed", 1)
    assert command("generate", "my secret", *asked) == 0
    assert marks.source_type(out.read_bytes()) == DRAWN
    assert command("generate", "my secret", *asked, KLEIN_METADATA="minimal") == 0
    assert command("generate", "--like", out, *asked) == 2
    assert "KLEIN_METADATA=full" in capsys.readouterr().err
    out.unlink()
    assert command("generate", "bad", *asked, **FILTER) == 2
    assert command("generate", "fail", *asked) == 75
    assert not out.exists()
    assert command("generate", "fine", *asked, "--num-images", 3) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-1.png", "a-3.png"]
    assert "refused image 2 (seed 2)" in capsys.readouterr().err


def test_the_doctor_says_what_is_in_force(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """And finds what would stop the start."""
    assert command("doctor", MODEL_ID="nano", KLEIN_LORA_CACHE=str(tmp_path)) == 0
    shown = capsys.readouterr().out
    for line in ("AI mark   on", "C2PA      off", "metadata  full", "filter    none"):
        assert f"  {line}" in shown
    assert "can start" in shown
    assert command("doctor", KLEIN_AI_MARK="off", KLEIN_METADATA="none", **FILTER) == 0
    shown = capsys.readouterr().out
    for line in ("AI mark   off", "metadata  none", f"filter    {FILTER['KLEIN_FILTER']}"):
        assert f"  {line}" in shown
    assert command("doctor", KLEIN_FILTER="no.such:filter") == 0
    assert "cannot start: KLEIN_FILTER: no.such:filter" in capsys.readouterr().out
