"""The LoRAs of a server over HTTP: list them, and where it is allowed add and delete them."""

import asyncio
import contextlib
import json
import tempfile
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import IO, Any, TypeVar

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from klein.app.generator import Generator
from klein.entrypoints.http.errors import described, error_response
from klein.entrypoints.http.limits import media_type
from klein.errors import InvalidRequest, KleinError, LoraUnavailable
from klein.lora.library import LoraLibrary
from klein.lora.spec import LoraSpec
from klein.sources.fetch import MAX_BYTES

router = APIRouter(tags=["loras"])
T = TypeVar("T")


FILE = {"type": "string", "format": "binary"}
REFERENCE_FIELDS = {"path", "name", "weight_name", "revision"}
REFERENCE = {
    "type": "object",
    "required": ["path"],
    "properties": {name: {"type": "string"} for name in sorted(REFERENCE_FIELDS)},
    "additionalProperties": False,
}
UPLOAD = {
    "parameters": [{"in": "query", "name": "name", "schema": {"type": "string"}}],
    "requestBody": {
        "required": True,
        "content": {
            "application/octet-stream": {"schema": FILE},
            "multipart/form-data": {"schema": {"type": "object", "properties": {"file": FILE}}},
            "application/json": {"schema": REFERENCE},
        },
    },
}
"""For OpenAPI."""


@router.get("/loras", response_model=dict[str, Any], responses=described())
async def list_loras(request: Request) -> Response:
    """Every LoRA at hand, with what is known of it; with several replicas, which drew what last."""
    library = _library(request)
    generator: Generator = request.app.state.generator
    warm = generator.warm()
    return await _answer(
        request,
        library.entries,
        lambda rows: {"loras": rows} | ({} if warm is None else {"warm": warm}),
    )


@router.post(
    "/loras",
    response_model=dict[str, Any],
    openapi_extra=UPLOAD,
    responses=described(400, 403, 408, 422),
)
async def add_lora(request: Request) -> Response:
    """Take a file as the body (`?name=x.safetensors`), as a form's `file`, or fetch the
    `{"path": …}` of a JSON body."""
    try:
        _require_uploads(request)
        library = _library(request)
        kind = media_type(request.headers)
        if kind == "application/json":
            spec, name = _reference(await request.body())
            return await _answer(request, partial(library.add_reference, spec, name))
        async with _body(request, kind) as (file, name):
            if name is None:
                raise InvalidRequest("name: add ?name=x.safetensors to the address", field="name")
            chunks = iter(partial(file.read, 1 << 20), b"")
            return await _answer(request, partial(library.add, name, chunks))
    except KleinError as error:
        return error_response(error)
    except OSError as error:
        return error_response(_disk(error))


@router.delete(
    "/loras/{name:path}", response_model=dict[str, str], responses=described(400, 403, 404, 422)
)
async def remove_lora(request: Request, name: str) -> Response:
    """Delete a LoRA of the folder."""
    try:
        _require_uploads(request)
    except KleinError as error:
        return error_response(error)
    remove = partial(_library(request).remove, name)
    return await _answer(request, remove, lambda _: {"removed": name})


def _library(request: Request) -> LoraLibrary:
    library: LoraLibrary = request.app.state.generator.library
    return library


def _require_uploads(request: Request) -> None:
    if not request.app.state.generator.settings.lora_uploads:
        raise InvalidRequest(
            "LoRAs cannot be added or deleted over HTTP: start klein with KLEIN_LORA_UPLOADS=on"
        )


def _reference(body: bytes) -> tuple[LoraSpec, str | None]:
    try:
        given = {key: value for key, value in json.loads(body).items() if value is not None}
        texts = all(isinstance(value, str) for value in given.values())
        if not texts or not given.keys() <= REFERENCE_FIELDS:
            raise ValueError("something else is in it")
        name = given.pop("name", None)
        return LoraSpec(**given), name
    except (ValueError, TypeError, AttributeError) as error:
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


async def _answer(
    request: Request, work: Callable[[], T], shape: Callable[[T], Any] = lambda row: row
) -> Response:
    """Do `work`, which reads and writes files, beside the event loop; what changes them may take
    as long as a job."""
    generator: Generator = request.app.state.generator
    seconds = None if request.method == "GET" else generator.settings.timeout
    try:
        return JSONResponse(shape(await generator.lanes.files.run(work, seconds)))
    except KleinError as error:
        return error_response(error)
    except OSError as error:
        return error_response(_disk(error))


def _disk(error: OSError) -> LoraUnavailable:
    return LoraUnavailable(f"the server's disk is in the way: {error.strerror}")
