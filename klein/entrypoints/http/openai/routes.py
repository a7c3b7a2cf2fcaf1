"""`/v1`: images and models as OpenAI's clients ask for them."""

import logging
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from klein.app.generator import Generated, Generator
from klein.core import ModelInfo, new_id
from klein.entrypoints.http.errors import OPENAI_ERRORS, OpenAIErrorBody, described
from klein.entrypoints.http.events import EventStream
from klein.entrypoints.http.generate import result_headers, run_while_connected
from klein.entrypoints.http.openai.answers import Kind, images_json, model_json, model_names
from klein.entrypoints.http.openai.form import FILES, FILLED_IN, read_edit
from klein.entrypoints.http.openai.schema import Asked, ImageRequest, translate
from klein.entrypoints.http.openai.stream import Drawing
from klein.errors import InternalError, KleinError, NotFound, NotReady

log = logging.getLogger(__name__)
router = APIRouter(prefix="/v1", tags=["openai"])


def _edit_schema() -> dict[str, Any]:
    """The form of an edit, for OpenAPI: the fields of a generation, and files."""
    schema = ImageRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs")
    for name in FILLED_IN:
        schema["properties"].pop(name)
    file = {"type": "string", "format": "binary"}
    files = {name: {"type": "array", "items": file} for name in FILES}
    schema["properties"] |= files | {"mask": file}
    return {**schema, "title": "ImageEdit"}


IMAGES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The images, or with `stream` their events.",
        "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}},
    }
}
FORM = {
    "requestBody": {
        "required": True,
        "content": {"multipart/form-data": {"schema": _edit_schema()}},
    }
}


@router.post("/images/generations", response_class=Response, responses=IMAGES | OPENAI_ERRORS)
async def generate_images(body: ImageRequest, request: Request) -> Response:
    """Draw images as OpenAI's `images.generate` asks for them."""
    return await _draw(translate(body, {}), body.model, request, Kind.GENERATION)


@router.post(
    "/images/edits",
    response_class=Response,
    responses=IMAGES | OPENAI_ERRORS,
    openapi_extra=FORM,
)
async def edit_images(request: Request) -> Response:
    """Edit images as OpenAI's `images.edit` asks for it: a form with image, image[] and mask."""
    form = await read_edit(request)
    return await _draw(translate(form.body, form.names), form.body.model, request, Kind.EDIT)


@router.post("/images/variations", include_in_schema=False)
async def vary_images() -> None:
    """Refuse what only OpenAI's retired models did."""
    raise NotFound("variations are not made here: send the image to /v1/images/edits")


@router.get("/models", responses=described(503, body=OpenAIErrorBody))
async def list_models(request: Request) -> dict[str, Any]:
    """The loaded model as OpenAI's list."""
    info = _generator(request).engine.pipeline.info
    return {"object": "list", "data": [model_json(info)]}


@router.get("/models/{id:path}", responses=described(404, 503, body=OpenAIErrorBody))
async def get_model(request: Request, id: str) -> dict[str, Any]:
    """The loaded model, by its id or name."""
    info = _generator(request).engine.pipeline.info
    _require_model(info, id)
    return model_json(info)


async def _draw(asked: Asked, model: str | None, request: Request, kind: Kind) -> Response:
    generator = _generator(request)
    id = request.state.request_id = new_id()
    try:
        if model is not None:
            _require_model(generator.engine.pipeline.info, model)
        answer = _stream if asked.stream else _answer
        return await answer(generator, asked, request, id, kind)
    except KleinError:
        raise
    except Exception as error:
        log.exception("request %s failed", id)
        raise InternalError("klein failed: see its log") from error


async def _answer(
    generator: Generator, asked: Asked, request: Request, id: str, kind: Kind
) -> Response:
    with asked.own_names():
        generated = await run_while_connected(
            generator, asked.request, generator.context(id), request
        )

    def render(generated: Generated) -> Response:
        headers = {**result_headers(generated), "x-request-id": id}
        return JSONResponse(images_json(asked, generated, generator.bucket), headers=headers)

    return await generator.render(generated, render)


async def _stream(
    generator: Generator, asked: Asked, request: Request, id: str, kind: Kind
) -> Response:
    drawing = Drawing(generator, asked, request, id)
    await drawing.first_news()
    return EventStream(drawing.lines(kind), generator.streaming(), **{"x-request-id": id})


def _generator(request: Request) -> Generator:
    generator: Generator | None = request.app.state.generator
    if generator is None:
        raise NotReady("klein is starting: try again in a minute")
    return generator


def _require_model(info: ModelInfo, name: str) -> None:
    if name.lower() not in model_names(info):
        raise NotFound(
            f"model: {name[:200]!r} is not loaded here; send {info.id!r}, or leave it out",
            field="model",
        )
