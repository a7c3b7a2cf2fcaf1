"""The FastAPI app beside BentoML's own routes; it runs without BentoML too."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from klein.app.generator import Generator
from klein.app.jobs import JobRegistry
from klein.app.webhooks import Webhooks
from klein.entrypoints.http import catalog, errors, jobs, loras


def create_app() -> FastAPI:
    """The app; it answers for a generator once `connect` has given it one."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, lifespan=_lifespan)
    app.include_router(catalog.router)
    app.include_router(loras.router)
    app.include_router(jobs.router)
    errors.install(app)
    app.state.generator = None
    app.state.jobs = None
    return app


def connect(app: FastAPI, generator: Generator) -> None:
    """Let `app` answer for `generator`; raises BadSetting for a webhook secret of a wrong form."""
    app.state.generator = generator
    app.state.jobs = JobRegistry(generator, Webhooks.from_settings(generator.settings))


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """When the server stops, every job ends and is told of before the GPU is given back."""
    yield
    if app.state.jobs is not None:
        await app.state.jobs.stop()
