"""`/generate` and `/generate_json`: BentoML serves them itself; without it this router does."""

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from klein.app.generator import Generated, Generator
from klein.core import RequestContext
from klein.engine.engine import REFUSALS, State
from klein.entrypoints.http.errors import ERRORS, error_response
from klein.errors import Cancelled, InternalError, InvalidRequest, KleinError, NotReady, QueueFull
from klein.output import response
from klein.request.formats import FORMATS
from klein.request.schema import GenerateRequest

log = logging.getLogger(__name__)
router = APIRouter(tags=["generate"])

HEADER_LIMIT = 4000
"""Characters; proxies refuse responses with long headers."""
DISCONNECT_POLL = 0.5
"""Seconds between two looks at whether the caller is still there."""
IMAGES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The image; seed, LoRAs, warnings and timings are in `x-klein-…` headers.",
        "content": {
            row.mime_type: {"schema": {"type": "string", "format": "binary"}}
            for row in FORMATS.values()
        },
    }
}


@router.post("/generate", response_class=Response, responses=IMAGES | ERRORS)
async def generate(asked: GenerateRequest, request: Request) -> Response:
    """One image, as a file in the format asked for, its parameters inside."""
    return await answer_with_image(request.app.state.generator, asked, request)


@router.post("/generate_json", response_model=dict[str, Any], responses=ERRORS)
async def generate_json(asked: GenerateRequest, request: Request) -> Response:
    """Images as base64 or links, with all there is to know about how they were made."""
    return await answer_with_json(request.app.state.generator, asked, request)


async def answer_with_image(
    generator: Generator, asked: GenerateRequest, request: Request
) -> Response:
    """The image itself, or an error."""

    def render(generated: Generated) -> Response:
        (image,) = response.encode(generated.result, generated.delivery, generated.marks)
        return Response(image.data, media_type=image.mime_type, headers=result_headers(generated))

    for field, only, instead in (("num_images", 1, "several"), ("return_type", "base64", "links")):
        if getattr(asked, field) != only:
            why = f"{field}: /generate answers with one image itself; ask /generate_json for "
            return error_response(InvalidRequest(why + instead, field=field))
    return await _answer(generator, asked, request, render)


async def answer_with_json(
    generator: Generator, asked: GenerateRequest, request: Request
) -> Response:
    """The JSON of a result, or an error."""

    def render(generated: Generated) -> Response:
        body = response.to_json(
            generated.result, generated.delivery, generated.marks, generator.bucket
        )
        return JSONResponse(body, headers=result_headers(generated))

    return await _answer(generator, asked, request, render)


async def _answer(
    generator: Generator,
    asked: GenerateRequest,
    request: Request,
    render: Callable[[Generated], Response],
) -> Response:
    context = generator.context()
    try:
        generated = await run_while_connected(generator, asked, context, request)
        return await generator.render(generated, render)
    except KleinError as error:
        full = isinstance(error, QueueFull)
        return error_response(error, context.id, generator.retry_after() if full else None)
    except Exception:
        log.exception("request %s failed", context.id)
        return error_response(InternalError("klein failed: see its log"), context.id)


async def run_while_connected(
    generator: Generator, asked: GenerateRequest, context: RequestContext, request: Request
) -> Generated:
    """`generator.run`, cancelled when the caller of `request` hangs up; then raises Cancelled.

    What the end of the server cancels can succeed elsewhere: NotReady.
    """
    work = asyncio.create_task(generator.run(asked, context))

    async def watch() -> None:
        while not await request.is_disconnected():  # noqa: ASYNC110 (ASGI has nothing to wait for)
            await asyncio.sleep(DISCONNECT_POLL)
        work.cancel()

    watcher = asyncio.create_task(watch())
    try:
        await asyncio.wait({work})
    except asyncio.CancelledError:
        work.cancel()
        await asyncio.wait({work})
        raise
    finally:
        watcher.cancel()
    try:
        if work.cancelled():
            raise Cancelled("the caller hung up")
        return work.result()
    except Cancelled as error:
        if generator.engine.state is State.STOPPED:
            raise NotReady(REFUSALS[State.STOPPED]) from error
        raise


def result_headers(generated: Generated) -> dict[str, str]:
    """What is worth knowing of a result without reading its body."""
    result = generated.result
    unchanged = result.images[0].unchanged_pixels  # which the mask decides, not the seed
    values = {
        "x-klein-request-id": result.id,
        "x-klein-seed": str(result.params.seed),
        "x-klein-speed": result.model.speed,
        "x-klein-timings": json.dumps(response.timings_json(result.timings)),
        "x-klein-warnings": json.dumps(list(result.warnings)),
        "x-klein-loras": json.dumps([response.lora_json(report) for report in result.loras]),
    }
    if unchanged is not None:
        values["x-klein-unchanged-pixels"] = str(unchanged)
    too_long = json.dumps("too long for a header: ask /generate_json")
    return {k: v if len(v) <= HEADER_LIMIT else too_long for k, v in values.items()}
