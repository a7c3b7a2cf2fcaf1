"""The FastAPI app beside BentoML's own routes; it runs without BentoML too."""

from fastapi import FastAPI

from klein.app.generator import Generator
from klein.entrypoints.http import catalog, loras


def create_app() -> FastAPI:
    """The app; it answers for a generator once `connect` has given it one."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.include_router(catalog.router)
    app.include_router(loras.router)
    app.state.generator = None
    return app


def connect(app: FastAPI, generator: Generator) -> None:
    """Let `app` answer for `generator`."""
    app.state.generator = generator
