import io
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bentoml._internal.container import BentoMLContainer
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from PIL import Image
from prometheus_client import generate_latest
from starlette.testclient import TestClient

import service
from klein.app.generator import Generator
from klein.engine.engine import Engine, State
from klein.entrypoints.http.app import connect, create_app
from klein.entrypoints.http.auth import RequireKey, read_keys
from klein.errors import DeliveryFailed, KleinError, LoraError, OutOfMemory
from klein.logs import JsonFormatter
from klein.lora.library import LoraLibrary
from klein.output.images import read_text
from klein.request.presets import PRESETS
from klein.request.schema import GenerateRequest
from klein.settings import Settings
from tests.support import fakes, loras, pictures

SECRET = "nobody else's business"
SAMPLED = {b"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01".encode()}
"""Of a caller whose traces are kept."""
FAKE = fakes.FakePipeline()
LEFT: list[KleinError] = []
"""Why the worker asked to be replaced."""


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    """The whole ASGI app of the service, as BentoML builds it, on the fake pipeline."""
    klein: Any = service.Klein
    klein.inner.load = staticmethod(lambda: FAKE)
    klein.inner.request_restart = staticmethod(LEFT.append)
    with TestClient(klein.to_asgi()) as client:
        while client.get("/readyz").status_code != 200:
            pass
        service.APP.state.generator.library = fakes.FakeLibrary()
        yield client


def test_generate_answers_with_the_file_asked_for(client: TestClient) -> None:
    """Right type, right size, parameters inside, seed and more in the headers."""
    answer = client.post(
        "/generate", json={"prompt": "a portrait", "seed": 5, "output_format": "webp"}
    )
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(answer.content)).size == (256, 256)
    assert "Seed: 5" in read_text(answer.content)
    assert answer.headers["x-klein-seed"] == "5"
    assert json.loads(answer.headers["x-klein-timings"])["total"] > 0
    assert answer.headers["x-klein-request-id"]


def test_presets_act_over_http(client: TestClient) -> None:
    """They never took effect in klein's predecessor, whose validator filled in defaults."""
    for name, preset in PRESETS.items():
        answer = client.post("/generate_json", json={"prompt": "x", "preset": name}).json()
        params = answer["parameters"]
        assert params["num_inference_steps"] == preset.num_inference_steps
        assert params["guidance_scale"] == preset.guidance_scale
        assert params["schedule"] == preset.schedule
        assert params["height"] / params["width"] == preset.height / preset.width


def test_generate_json_answers_with_everything(client: TestClient) -> None:
    """Several pictures, LoRA reports and warnings."""
    answer = client.post(
        "/generate_json",
        json={
            "prompt": "x",
            "num_images": 3,
            "seed": 1,
            "width": 250,
            "loras": [{"path": "missing.safetensors"}],
        },
    ).json()
    assert [image["seed"] for image in answer["images"]] == [1, 2, 3]
    assert answer["loras"][0]["applied"] is False
    assert any("rounded to 256" in w for w in answer["warnings"])
    assert any("DRAWN WITHOUT A LORA" in w for w in answer["warnings"])


def test_schema_errors_keep_bentomls_shape(client: TestClient) -> None:
    """400 with the field, or with the nearest known name of a field that does not exist."""
    answer = client.post("/generate", json={"prompt": "x", "num_inference_steps": 0})
    assert answer.status_code == 400
    assert answer.json()["detail"][0]["loc"] == ["num_inference_steps"]
    answer = client.post("/generate", json={"prompt": "x", "steps": 3})
    assert "did you mean 'num_inference_steps'" in answer.json()["detail"][0]["msg"]


@pytest.mark.parametrize(
    ("body", "field", "says"),
    [
        ({"num_images": 2}, "num_images", "/generate_json"),
        ({"return_type": "url"}, "return_type", "/generate_json"),
        ({"width": 16}, "width", "at least 64"),
    ],
)
def test_what_the_schema_cannot_say(
    client: TestClient, body: dict[str, object], field: str, says: str
) -> None:
    """Our own errors have one shape."""
    answer = client.post("/generate", json={"prompt": "x", **body})
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert (error["code"], error["field"]) == ("invalid_request", field)
    assert says in error["message"]


def test_errors_of_a_job(client: TestClient) -> None:
    """Status, retry-after, request id; nothing of an unknown error but where to look."""
    cases = [
        (LoraError("no such LoRA"), 422, "lora_failed", False),
        (DeliveryFailed("no bucket"), 502, "delivery_failed", True),
        (RuntimeError("/secret/path"), 500, "internal", False),
    ]
    try:
        for raised, status, code, retryable in cases:
            FAKE.fail = raised
            answer = client.post("/generate", json={"prompt": "x"})
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (status, code)
            assert error["retryable"] is retryable
            assert ("retry-after" in answer.headers) is retryable
            assert error["request_id"]
            assert "/secret/path" not in answer.text
    finally:
        FAKE.fail = None


def test_an_unhealthy_worker_is_replaced(client: TestClient) -> None:
    """Its answer goes out, then it is not ready, refuses, and ends for a fresh one."""
    FAKE.fail = OutOfMemory("too big")
    try:
        answer = client.post("/generate", json={"prompt": "x"})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (503, "out_of_memory")
        assert (error["message"], error["retryable"]) == ("too big", True)
        while not LEFT:
            pass
        assert client.get("/readyz").status_code == 503
        ping = client.get("/ping")
        assert (ping.status_code, ping.json()) == (503, {"status": "unhealthy"})
        assert client.get("/livez").status_code == 200
        answer = client.post("/generate", json={"prompt": "x"})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (503, "not_ready")
        assert "being replaced" in error["message"]
        assert answer.headers["retry-after"]
        assert client.get("/capabilities").json()["queue"]["state"] == "unhealthy"
        assert [str(why) for why in LEFT] == ["too big"]
    finally:
        FAKE.fail = None
        service.APP.state.generator.engine.state = State.READY


def test_links_without_a_bucket_are_refused_before_the_work(client: TestClient) -> None:
    """Nobody pays for a picture that cannot be delivered."""
    before = len(FAKE.drawn)
    answer = client.post("/generate_json", json={"prompt": "x", "return_type": "url"})
    assert answer.json()["error"]["field"] == "return_type"
    assert len(FAKE.drawn) == before


def test_plain_gets(client: TestClient) -> None:
    """What a client wants to know before it asks."""
    assert client.get("/ping").status_code == 200
    presets = client.get("/presets").json()
    assert [p["name"] for p in presets["presets"]] == list(PRESETS)
    models = client.get("/models").json()
    assert models["loaded"] == "nano"
    assert len(models["models"]) == 5
    capabilities = client.get("/capabilities").json()
    assert set(capabilities["request"]["properties"]) == set(GenerateRequest.model_fields)
    assert capabilities["queue"]["state"] == "ready"
    assert capabilities["model"]["spec"]["name"] == "nano"


def test_the_openapi_page_knows_every_field(client: TestClient) -> None:
    """BentoML's own documentation is complete, with the presets to choose from."""
    text = client.get("/docs.json").text
    for name in (*GenerateRequest.model_fields, *PRESETS):
        assert f'"{name}"' in text


def test_load_balancers_are_told_the_truth() -> None:
    """204 while loading, 503 when broken, and how."""
    app = create_app()
    probe = TestClient(app)
    assert probe.get("/ping").status_code == 204
    settings = Settings.from_env({})
    engine = Engine(lambda: FAKE, queue_size=1)
    connect(app, Generator(engine, fakes.FakeLibrary(), settings, None))
    assert probe.get("/ping").status_code == 204
    for state in (State.UNHEALTHY, State.STOPPED, State.FAILED):
        engine.state = state
        ping = probe.get("/ping")
        assert (ping.status_code, ping.json()) == (503, {"status": str(state)})
    assert probe.get("/capabilities").json()["model"] is None


@pytest.fixture
def folder(client: TestClient, tmp_path: Path) -> Iterator[Path]:
    """A LoRA folder that may be changed over HTTP."""
    generator = service.APP.state.generator
    before = generator.library, generator.settings
    generator.library = LoraLibrary(tmp_path)
    generator.settings = replace(generator.settings, lora_uploads=True)
    yield tmp_path
    generator.library, generator.settings = before


def test_headers_prove_the_loras(client: TestClient) -> None:
    """The whole report of each, or where to find it when it is too long for a header."""
    body = {"prompt": "x", "loras": [{"path": "a.safetensors"}, {"path": "missing"}]}
    applied, missing = json.loads(client.post("/generate", json=body).headers["x-klein-loras"])
    assert (applied["applied"], applied["layers_matched"]) == (True, 4)
    assert applied["sha256"] == "ab" * 32
    assert missing["error"] == "not there"
    body["loras"] = [{"path": f"{'x' * 700}/{n}"} for n in range(8)]
    told = json.loads(client.post("/generate", json=body).headers["x-klein-loras"])
    assert "generate_json" in told


def test_loras_over_http(client: TestClient, folder: Path) -> None:
    """Upload as body or form, list with facts, refuse junk, delete."""
    tensors, metadata = loras.ai_toolkit({"single_blocks.0.linear1": (72, 8)}, trigger="zib")
    data = loras.write(folder.parent / "made.safetensors", tensors, metadata).read_bytes()
    made = client.post("/loras?name=a.safetensors", content=data)
    assert made.status_code == 200
    assert made.json()["trigger_words"] == ["zib"]
    form = {"file": ("b.safetensors", data)}
    assert client.post("/loras", files=form).json()["name"] == "b.safetensors"
    rows = client.get("/loras").json()["loras"]
    assert [(row["name"], row["rank"], row["bytes"]) for row in rows] == [
        ("a.safetensors", 4, len(data)),
        ("b.safetensors", 4, len(data)),
    ]
    again = client.post("/loras?name=a.safetensors", content=data)
    assert (again.status_code, again.json()["error"]["field"]) == (400, "name")
    junk = client.post("/loras?name=c.safetensors", content=b"junk")
    assert (junk.status_code, junk.json()["error"]["code"]) == (422, "lora_failed")
    assert client.post("/loras", content=data).json()["error"]["field"] == "name"
    named = {"path": "a.safetensors", "name": "copy.safetensors", "weight_name": None}
    local = client.post("/loras", json=named)
    assert local.json()["name"] == "copy.safetensors"
    for wrong in ({"url": "x"}, {"path": 5}, {"path": "x", "revision": {}}, {"path": "x", "z": ""}):
        assert "owner/repo" in client.post("/loras", json=wrong).json()["error"]["message"]
    assert client.delete("/loras/a.safetensors").json() == {"removed": "a.safetensors"}
    assert client.delete("/loras/a.safetensors").status_code == 422
    assert client.delete("/loras/../../etc/passwd").status_code in (404, 422)
    assert sorted(p.name for p in folder.iterdir()) == ["b.safetensors", "copy.safetensors"]


def test_loras_cannot_be_changed_unless_allowed(client: TestClient) -> None:
    """By default anybody who can draw cannot fill the disk."""
    for answer in (
        client.post("/loras?name=a.safetensors", content=b"x"),
        client.delete("/loras/a.safetensors"),
    ):
        assert answer.status_code == 400
        assert "KLEIN_LORA_UPLOADS=on" in answer.json()["error"]["message"]


def test_bentomls_own_routes_want_a_key_too(client: TestClient) -> None:
    """Pages and metrics as well; probes do not."""
    keys = read_keys(Settings.from_env({"KLEIN_API_KEYS": "anna:0123456789abcdef"}))
    keyed = TestClient(RequireKey(client.app, keys))
    right, body = {"x-api-key": "0123456789abcdef"}, {"prompt": "x"}
    for path in ("/", "/docs.json", "/schema.json", "/metrics", "/presets", "/nothing"):
        assert keyed.get(path).status_code == 401
    for path in ("/generate", "/generate_json"):
        assert keyed.post(path, json=body).status_code == 401
        assert keyed.post(path, json=body, headers=right).status_code == 200
    for path in ("/livez", "/readyz", "/healthz", "/ping"):
        assert keyed.get(path).status_code == 200


def test_only_json_draws(client: TestClient) -> None:
    """BentoML would unpickle a body that says it is a pickle, and spool a form."""
    for kind in ("application/vnd.bentoml+pickle", "multipart/form-data; boundary=x", "text/plain"):
        answer = client.post("/generate", content=b"{}", headers={"content-type": kind})
        assert (answer.status_code, answer.json()["error"]["field"]) == (400, "content-type")


def test_edits_over_bentoml(client: TestClient) -> None:
    """Its schema takes pictures and nested fields as they are."""
    edit = {
        "prompt": "x",
        "init_image": pictures.text(pictures.noise(300, 200)),
        "images": [pictures.text(pictures.noise(100, 160))],
        "extend": {"left": 40},
    }
    answer = client.post("/generate_json", json=edit).json()
    assert answer["images"][0]["unchanged_pixels"] == 300 * 200
    assert answer["parameters"]["extend"] == {"left": 40, "right": 0, "top": 0, "bottom": 0}
    headers = client.post("/generate", json=edit).headers
    assert headers["x-klein-unchanged-pixels"] == str(300 * 200)
    headers = client.post("/generate", json={"prompt": "x"}).headers
    assert "x-klein-unchanged-pixels" not in headers
    bad = client.post("/generate_json", json={**edit, "images": ["aGk="]})
    assert bad.status_code == 400
    assert bad.json()["error"]["field"] == "images.0"


def by_path() -> list[str]:
    """The lines of /metrics that BentoML has for each path."""
    return [line for line in generate_latest().decode().splitlines() if "endpoint=" in line]


def test_paths_that_nobody_serves_share_a_label(client: TestClient) -> None:
    """And so do those of a route: 20,000 of them cost 134 MB once, and 17 s a scrape."""
    client.get("/nothing"), client.get("/jobs/x"), client.delete("/loras/x")
    before = len(by_path())
    for n in range(50):
        for path in (f"/n{n}", f"/jobs/j{n}/images/{n}/x", f"/%0a/{n}", "/" + "x" * n * 100):
            assert client.get(path).status_code in (200, 404, 405)
        assert client.get(f"/jobs/j{n}").status_code == 404
        assert client.get(f"/v1/models/a/{n}").status_code == 404
        client.delete(f"/loras/l{n}")
    after = by_path()
    assert len(after) < before + 50  # the buckets of routes that were not asked before
    endpoints = {label for line in after for label in re.findall(r'endpoint="(.*?)"', line)}
    assert endpoints >= {"/{unknown}", "/jobs/{id}", "/loras/{name:path}", "/v1/models/{id:path}"}


def test_metrics_that_break_are_answered(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once and in klein's shape: within BentoML's timeout, which klein takes out, a caller of a
    route that raises would wait for 16 minutes."""
    patient = TestClient(client.app, raise_server_exceptions=False)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/nowhere")  # somebody cleaned /tmp
    answer = patient.get("/metrics")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal")


@pytest.mark.parametrize("name", [b"content-type", b"user-agent", b"traceparent", b"baggage"])
@pytest.mark.parametrize("value", [b"\xff", b"\xff\\x", b"\xff\\u", b"\xc3("])
def test_header_bytes_that_are_no_text(client: TestClient, name: bytes, value: bytes) -> None:
    """BentoML's log and OpenTelemetry failed on them, after or before the answer."""
    scope: dict[str, Any] = {
        "type": "http",
        "method": "GET",
        "scheme": "http",
        "path": "/ping",
        "raw_path": b"/ping",
    }
    scope |= {
        "query_string": b"",
        "root_path": "",
        "http_version": "1.1",
        "asgi": {"version": "3.0"},
    }
    scope |= {"client": ("testclient", 1), "server": ("testserver", 80), "headers": [(name, value)]}
    sent: list[Any] = []

    async def ask() -> None:  # the test client would send UTF-8
        async def receive() -> Any:
            return {"type": "http.request"}

        async def send(message: Any) -> None:
            sent.append(message)

        await client.app(scope, receive, send)

    assert client.portal is not None
    client.portal.call(ask)
    assert sent[0]["status"] == 200


@contextmanager
def logged() -> Iterator[list[dict[str, Any]]]:
    """What the service logs, as JSON."""
    handler, found = logging.Handler(), list[dict[str, Any]]()
    handler.emit = lambda record: found.append(json.loads(JsonFormatter().format(record)))  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("klein", "bentoml")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    yield found
    for logger, level in zip(loggers, levels, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)


def test_a_request_that_is_refused_is_no_error(client: TestClient) -> None:
    """One line at INFO, no stack, nothing of the request; a fault of klein's is one with both."""
    bodies = [{"prompt": SECRET, "width": "x"}, {"prompt": SECRET, SECRET: 1}, {"prompt": [SECRET]}]
    with logged() as lines:
        for body in bodies:
            assert client.post("/generate", json=body).status_code == 400
        assert client.post("/generate", json={"prompt": SECRET, "width": 10}).status_code == 400
        assert (
            client.post("/jobs", json={"input": {"prompt": SECRET, SECRET: 1}}).status_code == 400
        )
    assert {line["level"] for line in lines} == {"info"}
    assert not any("stack" in line for line in lines)
    assert SECRET not in json.dumps(lines)
    FAKE.fail = RuntimeError("broken")
    with logged() as lines:
        client.post("/generate", json={"prompt": SECRET})
    FAKE.fail = None
    (error,) = (line for line in lines if line["level"] == "error")
    assert error["exception"] == "RuntimeError"
    assert "in generate" in error["stack"]
    assert SECRET not in json.dumps(lines)


def test_lines_of_a_request_name_it(client: TestClient) -> None:
    """By its id, a job by its own too, from every thread that works on it."""
    FAKE.fail = RuntimeError("broken")
    job = {"input": {"prompt": "x", "loras": [{"path": "a"}]}}
    with logged() as lines:
        client.put("/jobs/mine", json=job, headers={"prefer": "wait=10"})
    FAKE.fail = None
    drawn = [line for line in lines if line.get("job_id") == "mine"]
    assert {line["logger"] for line in drawn} >= {"klein.engine.engine", "klein.app.account"}
    assert len({line["request_id"] for line in drawn}) == 1
    (account,) = (line for line in drawn if line["logger"] == "klein.app.account")
    assert (account["outcome"], account["preset"]) == ("internal", "realistic_character")
    with logged() as lines:
        answer = client.post("/generate", json={"prompt": "x"})
    (access,) = (line for line in lines if line["logger"] == "klein.access")
    assert access["request_id"] == answer.headers["x-klein-request-id"]
    assert (access["path"], access["status"]) == ("/generate", 200)


def test_requests_are_traced_through_bentomls_provider(client: TestClient) -> None:
    """A span of klein's inside BentoML's, only where BentoML samples; its error by code alone."""
    exporter = InMemorySpanExporter()
    provider = BentoMLContainer.tracer_provider.get()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    client.post("/generate", json={"prompt": SECRET})
    assert not exporter.get_finished_spans()
    answer = client.post("/generate", json={"prompt": SECRET}, headers=SAMPLED)
    FAKE.fail = LoraError(SECRET)
    client.post("/generate", json={"prompt": SECRET}, headers=SAMPLED)
    FAKE.fail = None
    spans = exporter.get_finished_spans()
    exporter.shutdown()
    good, bad = (span for span in spans if span.name == "klein.request")
    inside = {span.context.span_id: span.name for span in spans if span.context}
    told = dict(good.attributes or {})
    assert good.parent
    assert inside[good.parent.span_id] == "POST /generate"
    assert told["klein.request_id"] == answer.headers["x-klein-request-id"]
    assert (told["klein.outcome"], good.status.is_ok) == ("ok", True)
    assert (bad.status.description, bad.events) == ("lora_failed", ())
    assert SECRET not in "".join(span.to_json() for span in spans)
