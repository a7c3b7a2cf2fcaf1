"""Results over HTTP: the image itself or JSON, with the same `x-klein-…` headers."""

import asyncio
import json

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from klein.app.generator import Generated, Generator
from klein.core import RequestContext
from klein.errors import Cancelled
from klein.output import response
from klein.output.delivery import Bucket
from klein.request.schema import GenerateRequest

HEADER_LIMIT = 4000
"""Characters; proxies refuse responses with long headers."""
DISCONNECT_POLL = 0.5
"""Seconds between two looks at whether the caller is still there."""


def image_response(generated: Generated) -> Response:
    """The one image of a result as a file."""
    (image,) = response.encode(generated.result, generated.delivery)
    return Response(image.data, media_type=image.mime_type, headers=_headers(generated))


def json_response(generated: Generated, bucket: Bucket | None) -> Response:
    """Images as base64 or links, with all there is to know about how they were made."""
    body = response.to_json(generated.result, generated.delivery, bucket)
    return JSONResponse(body, headers=_headers(generated))


async def run_while_connected(
    generator: Generator, asked: GenerateRequest, context: RequestContext, request: Request
) -> Generated:
    """`generator.run`, cancelled when the caller of `request` hangs up; then raises Cancelled."""
    work = asyncio.create_task(generator.run(asked, context))

    async def watch() -> None:
        while not await request.is_disconnected():
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
    if work.cancelled():
        raise Cancelled("the caller hung up")
    return work.result()


def _headers(generated: Generated) -> dict[str, str]:
    result = generated.result
    values = {
        "x-klein-request-id": result.id,
        "x-klein-seed": str(result.params.seed),
        "x-klein-speed": result.model.speed,
        "x-klein-timings": json.dumps(response.timings_json(result.timings)),
        "x-klein-warnings": json.dumps(list(result.warnings)),
        "x-klein-loras": json.dumps([response.lora_json(report) for report in result.loras]),
    }
    too_long = json.dumps("too long for a header: ask /generate_json")
    return {k: v if len(v) <= HEADER_LIMIT else too_long for k, v in values.items()}
