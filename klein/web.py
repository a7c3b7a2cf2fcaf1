"""What BentoML's own routes cannot do: plain GETs, as one ASGI app mounted beside the service."""

from dataclasses import asdict
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from klein import __version__, delivery, schedule, sizes
from klein.engine import Engine, State
from klein.formats import FORMATS
from klein.models import MODELS
from klein.presets import DEFAULT_PRESET, PRESETS
from klein.request import MAX_LORAS, GenerateRequest


def create_app() -> Starlette:
    """The app; the door sets `app.state.engine` when the engine exists."""
    return Starlette(
        routes=[
            Route("/presets", _presets),
            Route("/models", _models),
            Route("/capabilities", _capabilities),
            Route("/ping", _ping),
        ]
    )


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
        "return_types": delivery.RETURN_TYPES,
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
        case State.FAILED | State.STOPPED as state:
            return JSONResponse({"status": str(state)}, status_code=503)


def _engine(request: Request) -> Engine | None:
    return getattr(request.app.state, "engine", None)
