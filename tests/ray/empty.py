"""An application with the shape of klein's and nothing in it: what Ray Serve itself costs."""

import base64
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from ray import serve

from klein.entrypoints.ray import MANY, ONE_LOOP

FILE = bytes(20_000)
"""As large as a small image."""


class Replica:
    """Answers with one message, as a short job does."""

    async def draw(self, order: dict[str, Any]) -> AsyncIterator[bytes]:
        """A file."""
        yield FILE


class Ingress:
    """One route that asks a replica."""

    def __init__(self, handle: Any) -> None:
        self._draw = handle.options(method_name="draw", stream=True)

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = FastAPI()

        @app.post("/generate_json")
        async def generate(request: Request) -> dict[str, Any]:
            messages = self._draw.remote(await request.json())
            files = [base64.b64encode(file).decode() async for file in messages]
            return {"images": [{"base64": file} for file in files]}

        return app


def app(_: dict[str, Any]) -> Any:
    """The application."""
    replica = serve.deployment(
        Replica,
        name="Replica",
        max_ongoing_requests=MANY,
        ray_actor_options={"num_cpus": 0.5},
        logging_config={"enable_access_log": False},
    )
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name="Ingress",
        max_ongoing_requests=MANY,
        ray_actor_options={"num_cpus": 0.5, "runtime_env": {"env_vars": ONE_LOOP}},
    )
    return ingress.bind(replica.bind())
