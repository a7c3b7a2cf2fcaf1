"""What a client wants to know before it asks: presets, models, limits, readiness."""

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import HTMLResponse, JSONResponse, Response

from klein import __version__
from klein.app.generator import Generator
from klein.engine.engine import State
from klein.entrypoints.http.errors import described
from klein.models import sizes
from klein.models.catalog import MODELS
from klein.models.samplers import SAMPLERS
from klein.models.schedule import SCHEDULES
from klein.models.speed import TIERS
from klein.output.response import model_json
from klein.request.formats import FORMATS, RETURN_TYPES
from klein.request.presets import DEFAULT_PRESET, PRESETS
from klein.request.schema import MAX_LORAS, GenerateRequest

router = APIRouter(tags=["catalog"])

PING: dict[int | str, dict[str, Any]] = {
    204: {"description": "loading"},
    413: described()[413],
    503: {"description": "unhealthy, failed, stopped or filter_hangs, as `status` says"},
}
SWAGGER: dict[str, Any] = {
    "swagger_js_url": "static_content/swagger-ui-bundle.js",
    "swagger_css_url": "static_content/swagger-ui.css",
    "swagger_favicon_url": "static_content/favicon-light-32x32.png",
}
"""BentoML's copy, served beside the app: no page of klein's loads code from elsewhere."""


@router.get("/presets", responses=described())
async def presets() -> dict[str, Any]:
    """Named defaults for what a request leaves open."""
    return {"default": DEFAULT_PRESET, "presets": [asdict(row) for row in PRESETS.values()]}


@router.get("/models", responses=described())
async def models(request: Request) -> dict[str, Any]:
    """The models klein knows, and the one that is loaded."""
    ready = _ready(request)
    loaded = ready.engine.pipeline.info.id if ready else None
    return {"loaded": loaded, "models": [asdict(row) for row in MODELS.values()]}


@router.get("/capabilities", responses=described())
async def capabilities(request: Request) -> dict[str, Any]:
    """Everything this server can do: tables, limits, the request's schema, queue and model."""
    generator, ready = _generator(request), _ready(request)
    return {
        "klein": __version__,
        "schedules": {name: doc for name, (_, doc) in SCHEDULES.items()},
        "samplers": {row.name: row.doc for row in SAMPLERS.values()},
        "speeds": _speeds(ready) if ready else None,
        "formats": [asdict(row) for row in FORMATS.values()],
        "return_types": RETURN_TYPES,
        "limits": {
            "multiple_of": sizes.MULTIPLE,
            "smallest_side": sizes.SMALLEST,
            "most_pixels": sizes.MAX_PIXELS,
            "most_aspect": sizes.MAX_ASPECT,
            "loras": MAX_LORAS,
        },
        "lora_uploads": generator.settings.lora_uploads if generator else None,
        "marks": generator.marks.as_dict() if generator else None,
        "filter": generator.filter.as_dict() if generator and generator.filter else None,
        "jobs": _jobs(generator) if generator else None,
        "request": GenerateRequest.model_json_schema(),
        "queue": asdict(generator.engine.stats()) if generator else None,
        "model": _model(ready) if ready else None,
    }


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> HTMLResponse:
    """The OpenAPI description to read and try."""
    return get_swagger_ui_html(openapi_url="openapi.json", title="klein", **SWAGGER)


@router.get("/ping", responses=PING)
async def ping(request: Request) -> Response:
    """As RunPod's load balancer asks: 204 while loading, 200 when ready, 503 when broken."""
    generator = _generator(request)
    match generator.engine.state if generator else State.LOADING:
        case State.LOADING:
            return Response(status_code=204)
        case State.READY if generator and not generator.is_ready:
            return JSONResponse({"status": "filter_hangs"}, status_code=503)
        case State.READY:
            return JSONResponse({"status": "ready"})
        case State.UNHEALTHY | State.FAILED | State.STOPPED as state:
            return JSONResponse({"status": str(state)}, status_code=503)


def _jobs(generator: Generator) -> dict[str, Any]:
    """How long and how much of jobs is kept, and what they can do."""
    settings = generator.settings
    return {
        "keep_seconds": settings.jobs_keep_seconds,
        "keep_mb": settings.jobs_keep_mb,
        "event_streams": settings.event_streams,
        "webhooks": settings.webhook_secret is not None,
    }


def _speeds(generator: Generator) -> dict[str, str]:
    """The tiers that a request may name, and what each is; the model's own is in `model`."""
    return {name: TIERS[name].doc for name in generator.engine.pipeline.info.speeds}


def _model(generator: Generator) -> dict[str, Any]:
    pipeline = generator.engine.pipeline
    return {
        **model_json(pipeline.info),
        "spec": asdict(pipeline.info.spec),
        **asdict(pipeline.stats()),
    }


def _generator(request: Request) -> Generator | None:
    generator: Generator | None = request.app.state.generator
    return generator


def _ready(request: Request) -> Generator | None:
    generator = _generator(request)
    return generator if generator and generator.engine.state is State.READY else None
