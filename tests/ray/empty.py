"""An application with the shape of klein's and nothing in it: what Ray Serve itself costs."""

import base64
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from ray import serve

from klein.entrypoints.ray import MANY, ONE_LOOP

FILE = bytes(20_000)
"""As large as a small image."""
api = FastAPI()


class Replica:
    """Answers with one message of two, as a short job does."""

    async def draw(self, order: dict[str, Any]) -> AsyncIterator[bytes]:
        """A file."""
        yield FILE


class Ingress:
    """One route that asks a replica."""

    def __init__(self, handle: Any) -> None:
        self._draw = handle.options(method_name="draw", stream=True)

    @api.post("/generate_json")
    async def generate(self, request: Request) -> dict[str, Any]:
        """The shape of klein's answer."""
        files = [base64.b64encode(f).decode() async for f in self._draw.remote(await request.json())]
        return {"images": [{"base64": file} for file in files]}


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
        serve.ingress(api)(Ingress),
        name="Ingress",
        max_ongoing_requests=MANY,
        ray_actor_options={"num_cpus": 0.5, "runtime_env": {"env_vars": ONE_LOOP}},
    )
    return ingress.bind(replica.bind())
