"""The FastAPI app beside BentoML's own routes; it runs without BentoML too."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Security
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Mount, Route

from klein import __version__
from klein.app.generator import Generator
from klein.app.jobs import JobRegistry
from klein.app.webhooks import Webhooks
from klein.entrypoints.http import catalog, errors, generate, jobs, loras, playground
from klein.entrypoints.http.auth import RequireKey, is_open, read_keys
from klein.entrypoints.http.draining import Door, GuardDoor
from klein.entrypoints.http.limits import MB, LimitRequests, ReadToTheEnd
from klein.entrypoints.http.openai import routes as openai
from klein.errors import BadSetting
from klein.settings import Settings

PLAYGROUND = "To draw and try everything without a line of code: [the page](ui)."
"""Above the routes in `/docs`."""
KEYS = [
    Security(
        HTTPBearer(auto_error=False, description="one of the server's keys, where it has any")
    ),
    Security(APIKeyHeader(name="X-API-Key", auto_error=False, description="the same")),
]
"""How OpenAPI tells of keys; `RequireKey` looks at them."""
ROOMS = (generate, openai, jobs, catalog, loras, playground)
Middleware = tuple[Any, dict[str, Any]]
"""A class of ASGI middleware, and its options."""


class KleinApp(FastAPI):
    """Described with klein's errors and where no key is needed, without the 422 that FastAPI would
    answer by itself."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document."""
        document = super().openapi()
        for path, methods in document["paths"].items():
            for operation in methods.values():
                if is_open(path):
                    operation["security"] = [{}]
                if "HTTPValidationError" in str(operation["responses"].get("422")):
                    del operation["responses"]["422"]
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        return document


def create_app() -> FastAPI:
    """The app; it answers for a generator once `connect` has given it one."""
    app = KleinApp(
        title="klein",
        version=__version__,
        description=PLAYGROUND,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would name a scheme and a host behind a proxy
        lifespan=_lifespan,
    )
    for room in ROOMS:
        app.include_router(room.router, dependencies=KEYS)
    errors.install(app)
    app.state.generator = None
    app.state.jobs = None
    return app


def route_paths(app: FastAPI, outer: Starlette) -> list[str]:
    """The paths of all routes of `app`, and of `outer`, the app that it is mounted in."""
    routers = (outer, app, *(room.router for room in ROOMS))
    routes = [route for router in routers for route in router.routes]
    paths = [route.path for route in routes if isinstance(route, Route)]
    mounts = [route.path for route in routes if isinstance(route, Mount) and route.path]
    return [*paths, *(f"{path}/{{path:path}}" for path in mounts)]


def connect(app: FastAPI, generator: Generator) -> None:
    """Let `app` answer for `generator`; raises BadSetting for a webhook secret or keys of a wrong
    form."""
    if len(read_keys(generator.settings)) > 1:
        generator.share_places()
    app.state.generator = generator
    app.state.jobs = JobRegistry(generator, Webhooks.from_settings(generator.settings))


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """When the server stops, every job ends and is told of before the GPU is given back."""
    yield
    if app.state.jobs is not None:
        await app.state.jobs.stop()


def middlewares(settings: Settings, door: Door) -> list[Middleware]:
    """What every request passes, outermost first; raises BadSetting for keys or origins that
    cannot be meant."""
    chain: list[Middleware] = [(ReadToTheEnd, {})]
    if settings.cors_origins:
        if "*" in settings.cors_origins and len(settings.cors_origins) > 1:
            raise BadSetting(
                "KLEIN_CORS_ORIGINS: `*` is every origin: leave it out, or the others",
                field="KLEIN_CORS_ORIGINS",
            )
        every = {what: ["*"] for what in ("allow_methods", "allow_headers", "expose_headers")}
        chain.append((CORSMiddleware, {"allow_origins": sorted(settings.cors_origins), **every}))
    chain.append((GuardDoor, {"door": door}))
    chain.append((RequireKey, {"keys": read_keys(settings)}))
    chain.append((LimitRequests, {"picture_bytes": int(settings.max_body_mb * MB)}))
    return chain


def standalone(generator: Generator) -> FastAPI:
    """The app with its middlewares, without BentoML around it."""
    app = create_app()
    connect(app, generator)
    for middleware, options in reversed(middlewares(generator.settings, Door())):
        app.add_middleware(middleware, **options)
    return app
