"""What BentoML's own routes cannot do, as one ASGI app mounted beside the service."""

import asyncio
import contextlib
import json
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from functools import partial
from typing import IO, Any, TypeVar, assert_never

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from klein import __version__
from klein.engine.engine import Engine, State
from klein.errors import ErrorCode, InvalidRequest, KleinError
from klein.lora.library import LoraLibrary
from klein.lora.spec import LoraSpec
from klein.models import schedule, sizes
from klein.models.catalog import MODELS
from klein.request.formats import FORMATS, RETURN_TYPES
from klein.request.presets import DEFAULT_PRESET, PRESETS
from klein.request.schema import MAX_LORAS, GenerateRequest
from klein.sources.fetch import MAX_BYTES


def create_app() -> Starlette:
    """The app; the door sets `app.state`: `engine`, `loras` and whether `uploads` are allowed."""
    return Starlette(
        routes=[
            Route("/presets", _presets),
            Route("/models", _models),
            Route("/capabilities", _capabilities),
            Route("/ping", _ping),
            Route("/loras", _loras, methods=["GET"]),
            Route("/loras", _add_lora, methods=["POST"]),
            Route("/loras/{name:path}", _remove_lora, methods=["DELETE"]),
        ]
    )


def http_status(code: ErrorCode) -> int:
    """The HTTP status of each error; a new code does not type-check until it has one."""
    match code:
        case ErrorCode.INVALID_REQUEST | ErrorCode.BAD_SETTING:
            return 400
        case ErrorCode.LORA_FAILED:
            return 422
        case ErrorCode.QUEUE_FULL:
            return 429
        case ErrorCode.CANCELLED:
            return 499
        case ErrorCode.INTERNAL | ErrorCode.OUTPUT_TOO_LARGE:
            return 500
        case ErrorCode.DELIVERY_FAILED:
            return 502
        case ErrorCode.NOT_READY | ErrorCode.MODEL_UNAVAILABLE | ErrorCode.OUT_OF_MEMORY:
            return 503
        case ErrorCode.DEADLINE_EXCEEDED:
            return 504
    assert_never(code)


def error_response(error: KleinError, request_id: str | None = None) -> Response:
    """The one shape of klein's own errors."""
    headers = {"retry-after": "5"} if error.retryable else {}
    body = {"error": error.as_dict(request_id)}
    return JSONResponse(body, status_code=http_status(error.code), headers=headers)


async def _presets(request: Request) -> Response:
    return JSONResponse(
        {"default": DEFAULT_PRESET, "presets": [asdict(preset) for preset in PRESETS.values()]}
    )


async def _models(request: Request) -> Response:
    engine = _engine(request)
    loaded = engine.pipeline.info.id if engine and engine.state is State.READY else None
    return JSONResponse({"loaded": loaded, "models": [asdict(row) for row in MODELS.values()]})


async def _capabilities(request: Request) -> Response:
    engine = _engine(request)
    answer: dict[str, Any] = {
        "klein": __version__,
        "schedules": {name: doc for name, (_, doc) in schedule.SCHEDULES.items()},
        "formats": [asdict(row) for row in FORMATS.values()],
        "return_types": RETURN_TYPES,
        "limits": {
            "multiple_of": sizes.MULTIPLE,
            "smallest_side": sizes.SMALLEST,
            "most_pixels": sizes.MAX_PIXELS,
            "most_aspect": sizes.MAX_ASPECT,
            "loras": MAX_LORAS,
        },
        "request": GenerateRequest.model_json_schema(),
        "queue": engine.facts() if engine else None,
        "model": None,
    }
    if engine and engine.state is State.READY:
        answer["model"] = asdict(engine.pipeline.info) | engine.pipeline.facts()
    return JSONResponse(answer)


async def _ping(request: Request) -> Response:
    """As RunPod's load balancer asks: 204 while loading, 200 when ready, 503 when broken."""
    engine = _engine(request)
    match engine.state if engine else State.LOADING:
        case State.LOADING:
            return Response(status_code=204)
        case State.READY:
            return JSONResponse({"status": "ready"})
        case State.SICK | State.FAILED | State.STOPPED as state:
            return JSONResponse({"status": str(state)}, status_code=503)


def _engine(request: Request) -> Engine | None:
    return getattr(request.app.state, "engine", None)


# -- LoRAs -----------------------------------------------------------------------------------------

T = TypeVar("T")


async def _loras(request: Request) -> Response:
    loras: LoraLibrary = request.app.state.loras
    return await _answer(loras.entries, lambda rows: {"loras": rows})


async def _add_lora(request: Request) -> Response:
    """Take a file as the body (`?name=x.safetensors`), as a form's `file`, or fetch the
    `{"path": …}` of a JSON body."""
    loras: LoraLibrary = request.app.state.loras
    try:
        _require_uploads(request)
        kind = request.headers.get("content-type", "").split(";")[0]
        if kind == "application/json":
            spec, name = _reference(await request.body())
            return await _answer(partial(loras.add_reference, spec, name), lambda row: row)
        async with _body(request, kind) as (file, name):
            if name is None:
                raise InvalidRequest("name: add ?name=x.safetensors to the address", field="name")
            chunks = iter(partial(file.read, 1 << 20), b"")
            return await _answer(partial(loras.add, name, chunks), lambda row: row)
    except KleinError as error:
        return error_response(error)


async def _remove_lora(request: Request) -> Response:
    loras: LoraLibrary = request.app.state.loras
    name = request.path_params["name"]
    try:
        _require_uploads(request)
    except KleinError as error:
        return error_response(error)
    return await _answer(partial(loras.remove, name), lambda _: {"removed": name})


def _require_uploads(request: Request) -> None:
    if not request.app.state.uploads:
        raise InvalidRequest(
            "LoRAs cannot be added or deleted over HTTP: start klein with KLEIN_LORA_UPLOADS=on"
        )


def _reference(body: bytes) -> tuple[LoraSpec, str | None]:
    try:
        given = json.loads(body)
        name = given.pop("name", None)
        texts = {key: str(given.pop(key)) for key in ("weight_name", "revision") if key in given}
        spec = LoraSpec(
            str(given.pop("path")),
            weight_name=texts.get("weight_name"),
            revision=texts.get("revision"),
        )
        if given:
            raise ValueError(given)
        return spec, name
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidRequest(
            'send {"path": "owner/repo"}, with name, weight_name and revision if needed'
        ) from error


@contextlib.asynccontextmanager
async def _body(request: Request, kind: str) -> AsyncIterator[tuple[IO[bytes], str | None]]:
    """An uploaded file on disk, bounded, and its name."""
    name = request.query_params.get("name")
    if kind == "multipart/form-data":
        async with request.form(max_files=1, max_fields=4) as form:
            upload = form.get("file")
            if upload is None or isinstance(upload, str):
                raise InvalidRequest("file: the form has no file of that name", field="file")
            yield upload.file, name or upload.filename
        return
    with tempfile.TemporaryFile() as file:
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > MAX_BYTES:
                raise InvalidRequest(f"the file is larger than {MAX_BYTES} bytes")
            await asyncio.to_thread(file.write, chunk)
        file.seek(0)
        yield file, name


async def _answer(work: Callable[[], T], shape: Callable[[T], Any]) -> Response:
    """Do `work`, which reads and writes files, beside the event loop."""
    try:
        return JSONResponse(shape(await asyncio.to_thread(work)))
    except KleinError as error:
        return error_response(error)
