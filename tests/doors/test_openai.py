"""OpenAI's own Python client against the app on a real port, on a fake pipeline."""

import asyncio
import base64
import io
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import httpx
import pytest
from PIL import Image
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from klein.app.generator import Generator
from klein.core import GenerationResult, Job
from klein.entrypoints.http import events, generate
from klein.entrypoints.http.app import create_app, standalone
from klein.entrypoints.http.openai import form, schema, stream
from klein.errors import (
    BadSetting,
    Cancelled,
    Conflict,
    DeadlineExceeded,
    DeliveryFailed,
    Forbidden,
    InternalError,
    KleinError,
    LoraError,
    ModelUnavailable,
    NotReady,
    OutOfMemory,
    OutputTooLarge,
)
from klein.models import sizes
from klein.output.delivery import Bucket
from klein.output.images import read_text
from klein.request.images import MAX_BYTES
from klein.request.presets import DEFAULT_PRESET, PRESETS
from klein.request.schema import GenerateRequest
from klein.settings import Secret
from tests.support import asgi, docs, fakes, pictures

openai = pytest.importorskip("openai")

KEY = "0123456789abcdef"
PAGE = docs.ROOT / "docs/http-openai.md"
FACE = pictures.data(pictures.noise(256, 256))
OTHER = pictures.data(pictures.noise(128, 128, 1))
UNEVEN = [{"path": "a.safetensors"}, {"path": "b.safetensors", "scale": 1}]


def mask(box: tuple[int, int, int, int] = (64, 64, 192, 192)) -> bytes:
    """A mask as OpenAI means it: black, and transparent where it is to be repainted."""
    image = Image.new("RGBA", (256, 256), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), box)
    return pictures.data(image)


class SeenPipeline(fakes.FakePipeline):
    """Remembers its jobs."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: list[Job] = []

    def generate(self, job: Job) -> GenerationResult:
        self.jobs.append(job)
        return super().generate(job)


class Server:
    """The app on a port, its pipeline, how often it was asked, and how many bytes of the newest
    body it had read when it answered."""

    def __init__(self, generator: Generator, pipeline: SeenPipeline) -> None:
        self.generator = generator
        self.pipeline = pipeline
        self.requests = 0
        self.received = 0
        self.url = ""
        self.clients: list[Any] = []
        self._app = standalone(generator)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answered = False

        async def counted() -> Message:
            message = await receive()
            if not answered:
                self.received += len(message.get("body", b""))
            return message

        async def answer(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        self.requests += scope["type"] == "http"
        self.received = 0
        await self._app(scope, counted, answer)

    def client(self, **options: Any) -> Any:
        usual = {"base_url": f"{self.url}/v1", "api_key": KEY, "max_retries": 0, "timeout": 10}
        self.clients.append(openai.OpenAI(**usual | options))
        return self.clients[-1]

    @property
    def job(self) -> Job:
        return self.pipeline.jobs[-1]


@contextmanager
def serving(bucket: Bucket | None = None, **settings: str) -> Iterator[Server]:
    pipeline = SeenPipeline()
    generator = fakes.generator(pipeline, **settings)
    generator.bucket = bucket
    server = Server(generator, pipeline)
    app: ASGIApp = server
    with asgi.serve(app) as url:
        server.url = url
        yield server
        pipeline.gate.set()
        for client in server.clients:
            client.close()
    generator.stop()


@pytest.fixture(scope="module")
def shared() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def server(shared: Server) -> Iterator[Server]:
    yield shared
    shared.pipeline.fail = None
    shared.pipeline.gate.set()


@pytest.fixture
def client(server: Server) -> Any:
    return server.client()


def image_of(entry: Any) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(entry.b64_json)))


def refused(call: Any, kind: Any, **values: Any) -> Any:
    """The error that `call` raises, with OpenAI's keys and klein's."""
    with pytest.raises(kind) as raised:
        call(**{"prompt": "x"} | values)
    error = raised.value
    assert {"message", "type", "param", "code", "field", "retryable", "request_id"} <= set(
        error.body
    )
    assert error.param == error.body["field"]
    return error


# -- generations -----------------------------------------------------------------------------------


def test_a_generation_has_openais_keys_and_kleins(server: Server, client: Any) -> None:
    """The image with its parameters inside, its seed, usage, and how it was made."""
    before = int(time.time())
    answer = client.images.generate(prompt="a portrait", extra_body={"seed": 5})
    assert before <= answer.created <= time.time()
    (entry,) = answer.data
    assert image_of(entry).size == (256, 256)
    assert "Seed: 5" in read_text(base64.b64decode(entry.b64_json))
    assert (entry.url, entry.revised_prompt, entry.seed) == (None, None, 5)
    assert (answer.size, answer.quality, answer.output_format) == ("256x256", "medium", "png")
    assert answer.background == "opaque"
    told = answer.klein
    assert told["parameters"]["seed"] == 5
    assert told["parameters"]["preset"] == DEFAULT_PRESET
    assert set(told) == {
        "id",
        "parameters",
        "loras",
        "warnings",
        "timings",
        "transformer_forwards",
        "marks",
        "filter",
        "model",
    }
    assert told["warnings"] == []


def test_n_images_have_seeds_in_a_row(client: Any) -> None:
    """As klein's num_images; more than klein draws at once are refused as n."""
    answer = client.images.generate(prompt="x", n=3, extra_body={"seed": 7})
    assert [entry.seed for entry in answer.data] == [7, 8, 9]
    assert len({entry.b64_json for entry in answer.data}) == 3
    error = refused(client.images.generate, openai.BadRequestError, n=10)
    assert error.param == "n"
    assert error.message.count("num_images") == 0


@pytest.mark.parametrize(
    ("size", "drawn"), [("auto", (256, 256)), ("192x320", (192, 320)), ("250x256", (256, 256))]
)
def test_sizes(client: Any, size: str, drawn: tuple[int, int]) -> None:
    """`auto` is the preset's, any other is drawn, rounded with a warning where it must be."""
    answer = client.images.generate(prompt="x", size=size)
    assert image_of(answer.data[0]).size == drawn
    assert answer.size == f"{drawn[0]}x{drawn[1]}"
    assert any("rounded" in warning for warning in answer.klein["warnings"]) is (size == "250x256")


@pytest.mark.parametrize("size", ["4096x4096", "16x16", "wide", "1024x", "1024X1024", "٣x٣"])
def test_sizes_that_cannot_be_drawn(client: Any, size: str) -> None:
    """400 that names size, not klein's width or height."""
    error = refused(client.images.generate, openai.BadRequestError, size=size)
    assert error.param == "size"
    assert error.body["message"].startswith("size: ")


@pytest.mark.parametrize("quality", list(schema.QUALITIES))
def test_qualities_are_presets(server: Server, client: Any, quality: str) -> None:
    """By the table; the answer says which quality it was, and what was lowered is in a warning."""
    answer = client.images.generate(prompt="x", quality=quality)
    preset = schema.QUALITIES[quality] or DEFAULT_PRESET
    assert answer.klein["parameters"]["preset"] == preset
    assert server.job.params.num_inference_steps == PRESETS[preset].num_inference_steps
    assert answer.quality == {"fast_preview": "low", "maximum_quality": "high"}.get(
        preset, "medium"
    )
    assert bool(answer.klein["warnings"]) is (quality in ("xhigh", "max"))


def test_the_tables_have_every_word_of_the_schema() -> None:
    """The wire's qualities and the table's; what is ignored or refused is a field or a file."""
    annotation = schema.ImageRequest.model_fields["quality"].annotation
    assert set(get_args(get_args(annotation)[0])) == set(schema.QUALITIES)
    own = set(schema.ImageRequest.model_fields) - set(GenerateRequest.model_fields)
    routes = {"model", "background", "stream", "partial_images"}
    tables = [{alias.name for alias in schema.ALIASES}, schema.IGNORED, schema.REFUSED, routes]
    assert own == set().union(*tables)
    assert len(own) == sum(map(len, tables))


@pytest.mark.parametrize(
    ("fmt", "compression", "quality"),
    [("jpeg", 40, 40), ("webp", 100, 100), ("jpeg", 0, 1), ("png", 50, 50)],
)
def test_formats(server: Server, client: Any, fmt: str, compression: int, quality: int) -> None:
    """The file's own format; compression acts on all but png, where a warning says so."""
    answer = client.images.generate(prompt="x", output_format=fmt, output_compression=compression)
    assert image_of(answer.data[0]).format == fmt.upper()
    assert answer.output_format == fmt
    assert answer.klein["parameters"]["output_quality"] == quality
    assert bool(answer.klein["warnings"]) is (fmt == "png")


def test_kleins_fields_go_through_extra_body(server: Server, client: Any) -> None:
    """Every one of them acts, and LoRA reports come back."""
    sent = {
        "seed": 3,
        "num_inference_steps": 4,
        "guidance_scale": 2.5,
        "negative_prompt": "blur",
        "preset": "portrait_hd",
        "schedule": "ai_toolkit",
        "sampler": "euler",
        "max_sequence_length": 64,
    }
    loras = [{"path": "a.safetensors", "scale": 0.5}, {"path": "missing.safetensors", "scale": 1}]
    answer = client.images.generate(prompt="x", extra_body={**sent, "loras": loras})
    told = answer.klein
    assert {name: told["parameters"][name] for name in sent} == sent
    assert [report["applied"] for report in told["loras"]] == [True, False]
    assert any("DRAWN WITHOUT A LORA" in warning for warning in told["warnings"])
    assert server.job.params.guidance_scale == 2.5


def test_references_go_through_extra_body_too(server: Server, client: Any) -> None:
    """A generation takes klein's images, and a body of their size."""
    large = pictures.text(pictures.noise(800, 800))
    assert len(large) > 2_000_000
    client.images.generate(prompt="x", extra_body={"images": [large]})
    assert server.job.inputs.references[0].image.size == (256, 256)
    source = base64.b64encode(OTHER).decode()
    answer = client.images.generate(prompt="x", extra_body={"images": [source]})
    assert answer.usage.input_tokens_details.image_tokens == 8 * 8
    error = refused(
        client.images.generate, openai.BadRequestError, extra_body={"images": [source, "!"]}
    )
    assert error.param == "images.1"


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"size": "256x256", "extra_body": {"width": 256}}, "size"),
        ({"n": 1, "extra_body": {"num_images": 2}}, "n"),
        ({"quality": "low", "extra_body": {"preset": "fast_preview"}}, "quality"),
    ],
)
def test_a_thing_said_twice_is_refused(client: Any, values: dict[str, Any], param: str) -> None:
    """In OpenAI's words and in klein's."""
    assert refused(client.images.generate, openai.BadRequestError, **values).param == param


def test_what_changes_nothing_is_told(client: Any) -> None:
    """Each in a warning of its own; null is as if it were left out."""
    sent: dict[str, Any] = {
        "user": "u-1",
        "moderation": "auto",
        "style": "vivid",
        "extra_body": {"complexity": "low", "safety_identifier": "s", "input_fidelity": "high"},
    }
    answer = client.images.generate(prompt="x", **sent, partial_images=2)
    names = {warning.split(" ")[0] for warning in answer.klein["warnings"]}
    assert names == {*schema.IGNORED, "partial_images"}
    answer = client.images.generate(
        prompt="x", n=None, size=None, quality=None, user=None, background=None, stream=None
    )
    assert answer.klein["warnings"] == []


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"background": "transparent"}, "background"),
        ({"background": "pink"}, "background"),
        ({"moderation": "none"}, "moderation"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_compression": 101}, "output_compression"),
        ({"response_format": "url"}, "response_format"),
        ({"partial_images": 4, "stream": True}, "partial_images"),
        ({"response_format": "url", "stream": True}, "response_format"),
        ({"extra_body": {"svg": {"model": "x"}}}, "svg"),
        ({"extra_body": {"frame_count": 4}}, "frame_count"),
        ({"extra_body": {"seed": "5"}}, "seed"),
        ({"extra_body": {"preset": "nice"}}, "preset"),
        ({"extra_body": {"loras": [{"path": ""}]}}, "loras.0.path"),
        ({"prompt": ""}, "prompt"),
        ({"quality": "best"}, "quality"),
    ],
)
def test_what_klein_cannot_do_is_refused(client: Any, values: dict[str, Any], param: str) -> None:
    """400 whose param is the field, as the caller named it."""
    error = refused(client.images.generate, openai.BadRequestError, **values)
    assert (error.param, error.type) == (param, "invalid_request_error")
    assert error.code == "invalid_request"


def test_unknown_fields_are_refused(client: Any) -> None:
    """With the nearest that there is."""
    error = refused(client.images.generate, openai.BadRequestError, extra_body={"sed": 1})
    assert "did you mean 'seed'" in error.message


def test_links_where_there_is_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    """response_format url; base64 stays possible."""
    with serving(_bucket(monkeypatch)) as server:
        client = server.client()
        (entry,) = client.images.generate(prompt="x", response_format="url").data
        assert entry.url.startswith("https://bucket.example/klein/")
        assert entry.b64_json is None
        (entry,) = client.images.generate(prompt="x", response_format="b64_json").data
        assert entry.b64_json
        error = refused(
            client.images.generate, openai.BadRequestError, response_format="url", stream=True
        )
        assert error.param == "response_format"


def _bucket(monkeypatch: pytest.MonkeyPatch) -> Bucket:
    def put(self: Bucket, key: str, data: bytes, mime_type: str) -> str:
        return f"{self.endpoint}/{key}"

    monkeypatch.setattr(Bucket, "put", put)
    return Bucket("https://bucket.example", "b", Secret("k"), Secret("s"), 60)


def test_usage_counts_what_the_transformer_sees(client: Any) -> None:
    """The padded prompt once, 16×16 pixels a token of output for each image."""
    usage = client.images.generate(
        prompt="x", n=2, size="256x128", extra_body={"max_sequence_length": 32}
    ).usage
    assert usage.input_tokens_details.text_tokens == 32
    assert usage.input_tokens_details.image_tokens == 0
    assert usage.output_tokens == 2 * sizes.tokens(256, 128) == 256
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens == 288


def test_a_prompt_that_was_changed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As OpenAI's revised_prompt, where a trigger word was put in."""
    with serving() as server:
        find = server.generator.library.find

        def with_trigger(*args: Any, **options: Any) -> Any:
            return replace(find(*args, **options), trigger_words=("zib",))

        monkeypatch.setattr(server.generator.library, "find", with_trigger)
        lora = {"path": "a.safetensors", "trigger": "auto"}
        (entry,) = server.client().images.generate(prompt="x", extra_body={"loras": [lora]}).data
        assert entry.revised_prompt == server.job.params.prompt == "zib, x"


def test_headers(client: Any) -> None:
    """Of the raw response: klein's, and the id that the client calls the request's."""
    raw = client.images.with_raw_response.generate(prompt="x", extra_body={"seed": 9})
    assert raw.headers["x-klein-seed"] == "9"
    answer = raw.parse()
    assert raw.headers["x-request-id"] == answer.klein["id"] == answer._request_id
    assert json.loads(raw.headers["x-klein-timings"])["total"] > 0


def test_the_async_client(server: Server) -> None:
    """Two at once, and a stream."""

    async def ask() -> None:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
        async with client:
            first, second = await asyncio.gather(
                client.images.generate(prompt="x", extra_body={"seed": 1}),
                client.images.edit(prompt="x", image=FACE, extra_body={"seed": 2}),
            )
            assert (first.data[0].seed, second.data[0].seed) == (1, 2)
            events = await client.images.generate(prompt="x", stream=True, partial_images=1)
            kinds = [event.type async for event in events]
            assert kinds == ["image_generation.partial_image", "image_generation.completed"]

    asyncio.run(ask())


# -- streams ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("partial_images", [0, 1, 2, 3])
def test_partial_images(server: Server, client: Any, partial_images: int) -> None:
    """As many as asked for, decoded at the image's size, then the finished one with usage."""
    *partials, last = client.images.generate(
        prompt="x", stream=True, partial_images=partial_images, quality="low", output_format="webp"
    )
    assert [event.partial_image_index for event in partials] == list(range(partial_images))
    for event in partials:
        assert event.type == "image_generation.partial_image"
        assert isinstance(event, openai.types.ImageGenPartialImageEvent)
        assert image_of(event).format == "WEBP"
        assert image_of(event).size == (256, 256)
    assert isinstance(last, openai.types.ImageGenCompletedEvent)
    assert last.usage.output_tokens == 256
    for event in (*partials, last):
        assert (event.size, event.quality) == ("256x256", "low")
        assert (event.background, event.output_format) == ("opaque", "webp")
        assert abs(event.created_at - time.time()) < 5
    assert "Seed: " in read_text(base64.b64decode(last.b64_json))
    assert last.klein["parameters"]["seed"] == last.seed
    assert len({event.b64_json for event in (*partials, last)}) == partial_images + 1


def test_a_stream_of_several_images(client: Any) -> None:
    """Each has its own events; their tokens add up to those of the whole."""
    found = list(
        client.images.generate(
            prompt="x", n=2, stream=True, partial_images=1, extra_body={"seed": 4}
        )
    )
    partials, completed = found[:2], found[2:]
    assert [(e.image_index, e.partial_image_index) for e in partials] == [(0, 0), (1, 0)]
    assert [(e.image_index, e.seed) for e in completed] == [(0, 4), (1, 5)]
    whole = client.images.generate(prompt="x", n=2).usage
    assert sum(e.usage.total_tokens for e in completed) == whole.total_tokens


def test_partial_images_come_while_it_is_drawn(server: Server, client: Any) -> None:
    """Not all at the end: the first is there while the GPU is still at work."""
    half = threading.Event()
    gate = server.pipeline.gate
    steps = 8

    def hold(job: Job, step: int) -> None:
        if step == steps // 2 + 1:
            half.wait(10)

    with _after_each_step(server.pipeline, hold):
        found = client.images.generate(
            prompt="x", stream=True, partial_images=1, extra_body={"num_inference_steps": steps}
        )
        first = next(iter(found))
        assert first.type == "image_generation.partial_image"
        assert first.klein == {"step": 4, "steps": 8}
        half.set()
        assert [event.type for event in found] == ["image_generation.completed"]
    assert gate.is_set()


@contextmanager
def _after_each_step(pipeline: SeenPipeline, do: Any) -> Iterator[None]:
    """Call `do(job, step)` in the pipeline's thread."""
    plain = pipeline.generate

    def generate(job: Job) -> GenerationResult:
        def on_progress(progress: Any) -> None:
            do(job, progress.step)

        return plain(replace(job, context=replace(job.context, on_progress=on_progress)))

    pipeline.generate = generate  # type: ignore[method-assign]
    try:
        yield
    finally:
        del pipeline.generate


def test_a_stream_that_fails_early_has_a_status(server: Server, client: Any) -> None:
    """As if it were no stream."""
    values: dict[str, Any] = {"stream": True, "partial_images": 1}
    lora = {"loras": [{"path": "missing.safetensors"}], "lora_error": "fail"}
    call = client.images.generate
    assert refused(call, openai.UnprocessableEntityError, **values, extra_body=lora).body["message"]
    server.pipeline.fail = OutOfMemory("it did not fit")
    with serving() as own:
        own.pipeline.fail = OutOfMemory("it did not fit")
        refused(own.client().images.generate, openai.InternalServerError, **values)
    server.pipeline.fail = None


def test_a_stream_that_fails_late_ends_with_the_error(server: Server, client: Any) -> None:
    """After its first event: an error event, which the client raises."""

    def fail(job: Job, step: int) -> None:
        if step == 20:
            raise InternalError("the decoder gave up")

    with _after_each_step(server.pipeline, fail):
        found = iter(client.images.generate(prompt="x", stream=True, partial_images=2))
        assert next(found).type == "image_generation.partial_image"
        with pytest.raises(openai.APIError, match="the decoder gave up") as raised:
            list(found)
    assert raised.value.code == "internal"
    assert raised.value.type == "server_error"
    assert raised.value.body["request_id"] == server.job.context.id


def test_a_quiet_stream_is_kept_open(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """It begins, and comments keep it from being cut, while the image waits for the GPU."""
    monkeypatch.setattr(stream, "HEARTBEAT", 0.05)
    server.pipeline.gate.clear()
    body = {"prompt": "x", "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/images/generations", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-accel-buffering"] == events.HEADERS["x-accel-buffering"]
        lines = answer.iter_lines()
        comments = [next(lines) for _ in range(4)]
        assert all(line.startswith(":") for line in comments if line)
        server.pipeline.gate.set()
        assert any(line.startswith("event: image_generation.completed") for line in lines)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_client_that_hangs_up_frees_the_gpu(server: Server, streaming: bool) -> None:
    """Within a second, and nothing was drawn."""
    server.pipeline.gate.clear()
    server.pipeline.started.clear()
    body = {"prompt": "given up", "stream": streaming}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=0.3)
    assert server.pipeline.started.wait(1)
    _until(partial(_has, server, (False, 0)))
    assert "given up" not in server.pipeline.drawn
    assert isinstance(server.job.context.over, Cancelled)


def test_a_stream_that_is_left_frees_the_gpu(
    server: Server, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its first event, at once: not when somebody next looks for the caller."""
    monkeypatch.setattr(generate, "DISCONNECT_POLL", 60)
    reached = threading.Event()

    def hold(job: Job, step: int) -> None:
        if step == 20:
            server.pipeline.gate.clear()
            reached.set()

    with _after_each_step(server.pipeline, hold):
        found = client.images.generate(prompt="left alone", stream=True, partial_images=2)
        next(iter(found))
        assert reached.wait(5)
        found.close()
        _until(partial(_has, server, (False, 0)))
    assert "left alone" not in server.pipeline.drawn


def _has(server: Server, load: tuple[bool, int]) -> bool:
    """Whether a job runs, and how many wait."""
    stats = server.generator.engine.stats()
    return (stats.running, stats.waiting) == load


def _until(so: Callable[[], bool]) -> None:
    ends = time.monotonic() + 2
    while not so():
        assert time.monotonic() < ends
        time.sleep(0.01)


# -- edits -----------------------------------------------------------------------------------------


def test_an_edit_of_one_image(server: Server, client: Any) -> None:
    """It is a reference: drawing starts from noise, at the image's own shape."""
    answer = client.images.edit(prompt="x", image=("face.png", FACE, "image/png"))
    (reference,) = server.job.inputs.references
    assert reference.image.size == (256, 256)
    assert server.job.inputs.start is None
    assert server.job.params.strength is None
    usage = answer.usage
    assert usage.input_tokens_details.image_tokens == reference.tokens == 256
    assert usage.total_tokens == usage.input_tokens + 256
    assert answer.klein["parameters"]["images"][0]["sha256"]


def test_an_edit_of_several_images(server: Server, client: Any) -> None:
    """In their order; as files or bytes."""
    client.images.edit(prompt="x", image=[("a.png", FACE), ("b.png", io.BytesIO(OTHER))])
    sizes = [each.image.size for each in server.job.inputs.references]
    assert sizes == [(256, 256), (128, 128)]


def test_an_edit_with_a_mask(server: Server, client: Any) -> None:
    """Only what is transparent in the mask is repainted; the rest stays bit for bit."""
    answer = client.images.edit(prompt="x", image=FACE, mask=mask(), extra_body={"mask_feather": 0})
    drawn, sent = image_of(answer.data[0]), Image.open(io.BytesIO(FACE))
    inside, outside = (64, 64, 192, 192), (0, 0, 256, 64)
    assert drawn.crop(outside).tobytes() == sent.crop(outside).tobytes()
    assert len(drawn.crop(inside).getcolors() or ()) == 1
    assert answer.data[0].unchanged_pixels == 256 * 256 - 128 * 128
    assert answer.usage.input_tokens_details.image_tokens == 256
    assert server.job.params.strength == 1


def test_a_mask_belongs_to_the_first_image(server: Server, client: Any) -> None:
    """The others are references."""
    client.images.edit(prompt="x", image=[FACE, OTHER], mask=mask())
    sizes = [each.image.size for each in server.job.inputs.references]
    assert sizes == [(256, 256), (128, 128)]
    assert server.job.inputs.repaint is not None


def test_kleins_fields_in_a_form(server: Server, client: Any) -> None:
    """Numbers and switches come as text; loras as JSON or as the client's own brackets."""
    sent = {"seed": 3, "num_inference_steps": 4, "guidance_scale": 1.5, "negative_prompt": "12"}
    loras = [{"path": "a.safetensors", "scale": 0.5}, {"path": "b.safetensors", "scale": 1.0}]
    for given in (loras, json.dumps(loras)):
        answer = client.images.edit(
            prompt="007", image=FACE, n=2, size="128x128", extra_body={**sent, "loras": given}
        )
        told = answer.klein["parameters"]
        assert {name: told[name] for name in sent} == sent
        assert told["loras"] == loras
        assert (told["prompt"], told["num_images"], told["width"]) == ("007", 2, 128)


def test_strength_and_extend_start_from_the_first_image(server: Server, client: Any) -> None:
    """klein's own ways to edit, which OpenAI has not."""
    client.images.edit(prompt="x", image=[FACE, OTHER], extra_body={"strength": 0.4})
    assert server.job.inputs.start is not None
    assert len(server.job.inputs.references) == 1
    client.images.edit(prompt="x", image=FACE, extra_body={"extend": {"left": 64, "top": 16}})
    assert (server.job.params.extend.left, server.job.params.extend.top) == (64, 16)  # type: ignore[union-attr]


def test_an_edit_is_streamed(client: Any) -> None:
    """Under its own event names."""
    found = list(client.images.edit(prompt="x", image=FACE, stream=True, partial_images=2))
    partial, completed = (
        openai.types.ImageEditPartialImageEvent,
        openai.types.ImageEditCompletedEvent,
    )
    assert [type(event) for event in found] == [partial, partial, completed]
    assert found[-1].usage.input_tokens_details.image_tokens == 256


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"image": b""}, "image"),
        ({"image": b"no image"}, "image[0]"),
        ({"image": [FACE, b"no image"]}, "image[1]"),
        ({"image": [FACE] * 5}, "image"),
        ({"image": FACE, "mask": mask((0, 0, 0, 0))[:100]}, "mask"),
        ({"image": OTHER, "mask": mask()}, "mask"),
        ({"image": b"no image", "mask": mask()}, "image[0]"),
        ({"image": [FACE, b"no image"], "mask": mask()}, "image[1]"),
        ({"image": FACE, "markup": mask()}, "markup"),
        ({"image": FACE, "background": "transparent"}, "background"),
        ({"image": FACE, "n": 9}, "n"),
        ({"image": FACE, "size": "1x1"}, "size"),
        ({"image": FACE, "extra_body": {"seed": "many"}}, "seed"),
        ({"image": FACE, "extra_body": {"loras": "[{"}}, "loras"),
        ({"image": FACE, "extra_body": {"loras": UNEVEN}}, "loras"),
        ({"image": FACE, "extra_body": {"images": ["x"]}}, "images"),
        ({"image": FACE, "extra_body": {"mask_padding": 8}}, "mask_padding"),
    ],
)
def test_edits_that_cannot_be_done(client: Any, values: dict[str, Any], param: str) -> None:
    """400 whose param is the caller's own name of the part."""
    assert refused(client.images.edit, openai.BadRequestError, **values).param == param


@pytest.mark.parametrize(("megabytes", "most"), [([40], MAX_BYTES), ([15] * 5, 68_000_000)])
def test_forms_too_large_end_while_they_are_read(
    server: Server, megabytes: list[int], most: int
) -> None:
    """413 at the first chunk too many of a file, which is named, or of the body."""

    def body() -> Iterator[bytes]:
        for size in megabytes:
            yield b'--b\r\ncontent-disposition: form-data; name="image"; filename="x"\r\n\r\n'
            for _ in range(size):
                yield bytes(1_000_000)
            yield b"\r\n"

    headers = {"content-type": "multipart/form-data; boundary=b"}
    with httpx.Client(timeout=10) as client:
        try:
            answer = client.post(f"{server.url}/v1/images/edits", content=body(), headers=headers)
        except (httpx.WriteError, httpx.ReadError):
            pass  # the server had answered and closed before all was sent
        else:
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (413, "request_too_large")
            assert error["type"] == "invalid_request_error"
            assert error["param"] == ("image" if most == MAX_BYTES else None)
    assert most <= server.received < most + 1_500_000


def test_an_image_may_be_an_address_or_base64(server: Server, client: Any) -> None:
    """As in klein's own fields; an empty one is refused under its own name."""
    url, small = f"{server.url}/v1/images/edits", Image.new("RGB", (64, 64), "red")
    data = {
        "prompt": "x",
        "image[]": [pictures.text(small), f"data:image/png;base64,{pictures.text(small)}"],
    }
    assert httpx.post(url, data=data, files={"image[]": ("a.png", FACE)}).status_code == 200
    assert sorted(each.width for each in server.job.inputs.references) == [64, 64, 256]
    data |= {"image[]": ["", pictures.text(small)]}
    error = httpx.post(url, data=data, files={"image[]": ("a.png", FACE)}).json()["error"]
    assert error["param"] == "image[0]"


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"{}", "application/json"),
        (b"", "multipart/form-data"),
        (b"nonsense", "multipart/form-data; boundary=b"),
        (b"--b\r\n\r\nx\r\n--b--\r\n", "multipart/form-data; boundary=b"),
        (b"image=x", "application/x-www-form-urlencoded"),
        (b"", ""),
    ],
)
def test_forms_that_are_none(server: Server, content: bytes, kind: str) -> None:
    """400 in OpenAI's shape."""
    url = f"{server.url}/v1/images/edits"
    answer = httpx.post(url, content=content, headers={"content-type": kind} if kind else {})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_forms_are_bounded(server: Server) -> None:
    """In texts, their length, and their number."""
    url = f"{server.url}/v1/images/edits"
    files = {"image": ("a.png", FACE)}
    too_much: list[dict[str, Any]] = [
        {"prompt": "x" * (form.MAX_TEXT + 1)},
        {f"a{n}": "x" for n in range(form.MAX_FIELDS + 1)},
        {"prompt": "x", "loras": "[" * 60_000},
        {"prompt": "x", "seed": "9" * 10_000},
        {"prompt": "x", "a" * 200: "x"},
        {"prompt": ["x", "y"]},
        {"prompt": "x", "loras[]": "x", "loras[][path]": "y"},
    ]
    for data in too_much:
        answer = httpx.post(url, data=data, files=files)
        assert answer.status_code == 400, data
        assert len(answer.text) < 1000


# -- errors ----------------------------------------------------------------------------------------

STATUSES: list[tuple[KleinError, Any, bool]] = [
    (BadSetting("x"), "BadRequestError", False),
    (Forbidden("x"), "PermissionDeniedError", False),
    (Conflict("x"), "ConflictError", False),
    (LoraError("x"), "UnprocessableEntityError", False),
    (InternalError("x"), "InternalServerError", False),
    (OutputTooLarge("x"), "InternalServerError", False),
    (ModelUnavailable("x"), "InternalServerError", False),
    (DeadlineExceeded("x"), "InternalServerError", False),
    (DeliveryFailed("x"), "InternalServerError", True),
    (NotReady("x"), "InternalServerError", True),
]


@pytest.mark.parametrize(("error", "kind", "again"), STATUSES, ids=lambda x: type(x).__name__)
def test_every_error_has_its_class_and_only_some_are_tried_again(
    server: Server, error: KleinError, kind: str, again: bool
) -> None:
    """The client would ask twice more: it is kept from that where a retry cannot mend it."""
    server.pipeline.fail = error
    before = server.requests
    client = server.client(max_retries=0 if again else 2)
    caught = refused(client.images.generate, getattr(openai, kind))
    headers = caught.response.headers
    assert caught.code == str(error.code)
    assert headers["x-request-id"] == caught.request_id == caught.body["request_id"]
    assert ("retry-after" in headers) is error.retryable
    assert headers.get("x-should-retry") == (None if again else "false")
    assert server.requests == before + 1


def test_a_full_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """429 with retry-after; the client asks as often as it was told to, and no more."""
    with serving(KLEIN_QUEUE_SIZE="1") as server:
        monkeypatch.setattr(server.generator, "retry_after", lambda: 0.1)
        server.pipeline.gate.clear()
        body = {"prompt": "x"}
        url = f"{server.url}/v1/images/generations"
        ask = partial(httpx.post, url, json=body, timeout=20)
        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread, full in zip(threads, ((True, 0), (True, 1)), strict=True):
            thread.start()
            _until(partial(_has, server, full))
        before = server.requests
        error = refused(server.client(max_retries=1).images.generate, openai.RateLimitError)
        assert server.requests == before + 2
        assert (error.type, error.code) == ("rate_limit_error", "queue_full")
        assert error.response.headers["retry-after"] == "1"
        server.pipeline.gate.set()
        for thread in threads:
            thread.join(5)


def test_a_retry_that_succeeds(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client gets its image, as if nothing had been."""
    failures = [NotReady("in a moment")]
    plain = server.generator.run

    async def once(*args: Any) -> Any:
        if failures:
            raise failures.pop()
        return await plain(*args)

    monkeypatch.setattr(server.generator, "run", once)
    monkeypatch.setattr("klein.entrypoints.http.errors.RETRY_SECONDS", 0.1)
    before = server.requests
    assert server.client(max_retries=2).images.generate(prompt="x").data
    assert server.requests == before + 2


def test_what_nobody_foresaw(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """500 in shape, without what happened inside."""

    async def broken(*_: Any) -> Any:
        raise ZeroDivisionError("/secret/path")

    monkeypatch.setattr(server.generator, "run", broken)
    for streaming in (False, True):
        error = refused(
            server.client().images.generate, openai.InternalServerError, stream=streaming
        )
        assert error.code == "internal"
        assert "secret" not in error.response.text


def test_keys_are_openais_api_keys() -> None:
    """The right one is let in, another is 401 in OpenAI's shape, on streams too."""
    with serving(KLEIN_API_KEYS=f"anna:{KEY}") as server:
        assert server.client().images.generate(prompt="x").data
        wrong = server.client(api_key="0" * 16)
        for call in (wrong.images.generate, wrong.models.list):
            with pytest.raises(openai.AuthenticationError) as raised:
                call(prompt="x") if call == wrong.images.generate else call()
            assert raised.value.type == "authentication_error"
            assert raised.value.code == "unauthorized"


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"{", "application/json"),
        (b"", "application/json"),
        (b"[]", "application/json"),
        (b"null", "application/json"),
        (b'{"prompt": NaN}', "application/json"),
        (b"prompt=x", "application/x-www-form-urlencoded"),
        (b'{"prompt": "x"}', "text/plain"),
        (b"", ""),
    ],
)
def test_bodies_that_are_no_json(server: Server, content: bytes, kind: str) -> None:
    """400 in OpenAI's shape, whoever refuses it."""
    url = f"{server.url}/v1/images/generations"
    answer = httpx.post(url, content=content, headers={"content-type": kind} if kind else {})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert {"message", "param", "code", "retryable"} <= set(error)


def test_routes_and_methods_that_are_not_there(server: Server, client: Any) -> None:
    """404 and 405 in OpenAI's shape; elsewhere in klein's own."""
    for path in ("/images/variations", "/nowhere"):
        with pytest.raises(openai.NotFoundError) as raised:
            client.post(path, body={}, cast_to=object)
        assert raised.value.code == "not_found"
    answer = httpx.get(f"{server.url}/v1/images/generations")
    assert (answer.status_code, answer.json()["error"]["type"]) == (405, "invalid_request_error")
    assert "type" not in httpx.get(f"{server.url}/nowhere").json()["error"]


# -- models ----------------------------------------------------------------------------------------


def test_models(server: Server, client: Any) -> None:
    """The loaded one, listed and by its names, whatever their case."""
    (model,) = client.models.list().data
    assert (model.id, model.object) == ("nano", "model")
    assert model.created > 1_700_000_000
    assert client.models.retrieve("NANO") == model
    assert client.images.generate(prompt="x", model=model.id).data
    for call in (
        lambda: client.models.retrieve("gpt-image-2"),
        lambda: client.images.generate(prompt="x", model="gpt-image-2"),
        lambda: client.images.generate(prompt="x", model="owner/name", stream=True),
        lambda: client.images.edit(prompt="x", image=FACE, model="dall-e-2"),
    ):
        with pytest.raises(openai.NotFoundError) as raised:
            call()
        assert (raised.value.code, raised.value.param) == ("model_not_found", "model")
        assert "'nano'" in raised.value.message


def test_a_models_name_with_a_slash(client: Any, server: Server) -> None:
    """As Hub ids have."""
    info = server.pipeline.info
    server.pipeline.info = replace(info, id="owner/nano")
    try:
        assert client.models.retrieve("owner/nano").id == "owner/nano"
        assert client.models.retrieve("nano").id == "owner/nano"
    finally:
        server.pipeline.info = info


def test_a_server_that_is_still_loading() -> None:
    """503 with retry-after, on every route."""
    with (
        asgi.serve(create_app()) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client,
    ):
        for call in (
            client.models.list,
            partial(client.images.generate, prompt="x"),
            partial(client.images.edit, prompt="x", image=FACE),
        ):
            with pytest.raises(openai.InternalServerError) as raised:
                call()
            assert (raised.value.code, raised.value.status_code) == ("not_ready", 503)
            assert raised.value.response.headers["retry-after"]


# -- descriptions ----------------------------------------------------------------------------------


def test_openapi_describes_the_routes(server: Server) -> None:
    """Both bodies with klein's fields, files as files, and every status of an error."""
    described = httpx.get(f"{server.url}/openapi.json").json()
    edits = described["paths"]["/v1/images/edits"]["post"]
    fields = edits["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
    assert fields["mask"] == {"type": "string", "format": "binary"}
    assert {"image", "image[]", "seed", "n", "loras"} <= set(fields)
    assert not {"images", "init_image"} & set(fields)
    assert {"400", "401", "404", "422", "429", "500", "503", "504"} <= set(edits["responses"])
    names = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(described)))
    assert names <= set(described["components"]["schemas"])


def test_the_pages_example_runs(server: Server, tmp_path: Any, monkeypatch: Any) -> None:
    """As printed, but for the port."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "man.png").write_bytes(FACE)
    (tmp_path / "mask.png").write_bytes(mask())
    blocks = docs.blocks(PAGE, "python")
    assert blocks
    for block in blocks:
        text = block.text.replace("http://localhost:3000", server.url)
        exec(compile(text, PAGE.name, "exec"), {})
    assert list(tmp_path.glob("*.webp"))
