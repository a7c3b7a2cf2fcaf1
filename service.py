"""The BentoML door: `bentoml serve service:Klein`.

Each API only parses, resolves, runs and renders. Pictures are encoded off the event loop.
"""

import asyncio
import json
import logging
import os
import secrets
import signal
import sys
import threading
import time
from dataclasses import asdict
from typing import Any, NoReturn

import bentoml
from PIL import Image
from starlette.responses import JSONResponse, Response

from klein.app import build as startup
from klein.core import GenerationResult, ImagePipeline, Job
from klein.engine.engine import Engine, State
from klein.entrypoints.http import app as web
from klein.errors import InternalError, InvalidRequest, KleinError
from klein.lora.library import LoraLibrary
from klein.output import response as render
from klein.output.delivery import Bucket
from klein.request.resolve import resolve
from klein.request.schema import GenerateRequest
from klein.settings import Settings

log = logging.getLogger("bentoml.klein")

WEB = web.create_app()
KERNELS = bentoml.metrics.Gauge(
    "klein_kernels_compiled",
    "GPU kernels made ready since the start; it grows while klein warms up and not after",
    multiprocess_mode="livemax",
)
HEADER_LIMIT = 4000
"""Characters; proxies refuse responses with long headers."""
LEAVE_SECONDS = 30.0
"""How long a sick worker may take to deliver its answers."""


def _stop(error: KleinError) -> NoReturn:
    """End a start that cannot succeed with its one sentence."""
    print(f"\nklein cannot start: {error}\n", file=sys.stderr, flush=True)
    sys.exit(1)


def _settings() -> Settings:
    try:
        return Settings.from_env(os.environ)
    except KleinError as error:
        _stop(error)


SETTINGS = _settings()


@bentoml.service(
    name="klein",
    workers=1,
    resources={"gpu": 1},
    traffic={"timeout": SETTINGS.timeout + 60},
    metrics={"duration": {"buckets": [0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0]}},
)
@bentoml.asgi_app(WEB, name="web")
class Klein:
    """FLUX.2-klein with LoRAs."""

    @staticmethod
    def load(loras: LoraLibrary) -> ImagePipeline:
        """The pipeline of the settings; imports torch only now, in the worker."""
        return startup.loader(SETTINGS, os.environ, loras)()

    @staticmethod
    def leave(error: KleinError) -> None:
        """End this worker once its answers are out, since only a fresh one gets the memory back.

        BentoML starts it, or, in a container, ends the server, which whoever runs the container
        starts again. A worker that cannot deliver within LEAVE_SECONDS ends without that.
        """
        log.error("klein ends this worker and a fresh one follows: %s", error)
        backstop = threading.Timer(LEAVE_SECONDS, os._exit, [1])
        backstop.daemon = True
        backstop.start()
        os.kill(os.getpid(), signal.SIGTERM)

    @bentoml.on_deployment
    @staticmethod
    def preflight() -> None:
        """Refuse, before any worker is started, what cannot work."""
        try:
            startup.loader(SETTINGS, os.environ)
            Bucket.from_settings(SETTINGS)
        except KleinError as error:
            _stop(error)

    def __init__(self) -> None:
        self.bucket = Bucket.from_settings(SETTINGS)
        self.loras = startup.library(SETTINGS)
        self.engine = Engine(
            self._load_and_greet,
            queue_size=SETTINGS.queue_size,
            on_load_failed=_give_up,
            on_sick=self.leave,
        ).start()
        WEB.state.engine = self.engine
        WEB.state.loras = self.loras
        WEB.state.uploads = SETTINGS.lora_uploads

    def _load_and_greet(self) -> ImagePipeline:
        log.info("loading %s", SETTINGS.model_id)
        pipeline = self.load(self.loras)
        KERNELS.set(pipeline.facts().get("kernels_compiled", 0))
        url = f"http://localhost:{os.environ.get('BENTOML_PORT') or os.environ.get('PORT', 3000)}"
        log.info("%s is ready at %s; try:\n\n%s\n", SETTINGS.model_id, url, _example(url))
        return pipeline

    def __is_ready__(self) -> bool:
        return self.engine.state is State.READY

    @bentoml.on_shutdown
    def shutdown(self) -> None:
        """Free the GPU: running jobs end at their next step."""
        self.engine.stop()

    @bentoml.api(input_spec=GenerateRequest)
    async def generate(self, ctx: bentoml.Context, **params: Any) -> Image.Image:
        """One picture, as a file in the format asked for, its parameters inside.

        Seed, request id, LoRAs, warnings and timings are in the `x-klein-…` headers.
        """
        return await self._answer(ctx, params, _as_image)  # type: ignore[return-value]

    @bentoml.api(input_spec=GenerateRequest)
    async def generate_json(self, ctx: bentoml.Context, **params: Any) -> dict[str, Any]:
        """Pictures as base64 or links, with all there is to know about how they were made."""
        return await self._answer(ctx, params, self._as_json)  # type: ignore[return-value]

    async def _answer(
        self, ctx: bentoml.Context, params: dict[str, Any], renderer: Any
    ) -> Response:
        response = await self._respond(ctx, params, renderer)
        ctx.response.status_code = response.status_code  # BentoML would make it 200
        return response

    async def _respond(
        self, ctx: bentoml.Context, params: dict[str, Any], renderer: Any
    ) -> Response:
        job_id = None
        try:
            request = GenerateRequest.model_validate(params)
            if renderer is _as_image:
                _require_one_picture(request)
            render.require_bucket(request.return_type, self.bucket)
            spec = self.engine.pipeline.info.spec
            resolved = resolve(
                request,
                spec,
                lambda: secrets.randbelow(2**32),
                prompt_loras=SETTINGS.prompt_loras,
            )
            deadline = time.monotonic() + SETTINGS.timeout
            job = Job(resolved.params, deadline, resolved.warnings)
            job_id = job.id
            result = await self._run(ctx, job)
            return await asyncio.to_thread(renderer, result)
        except KleinError as error:
            return web.error_response(error, job_id)
        except Exception:
            log.exception("request %s failed", job_id)
            return web.error_response(InternalError("klein failed: see its log"), job_id)

    async def _run(self, ctx: bentoml.Context, job: Job) -> GenerationResult:
        """Run `job`, and cancel it when the caller hangs up."""

        async def watch() -> None:
            while not await ctx.request.is_disconnected():
                await asyncio.sleep(0.5)
            self.engine.cancel(job)

        watcher = asyncio.create_task(watch())
        try:
            result = await self.engine.run(job)
        finally:
            watcher.cancel()
        KERNELS.set(self.engine.pipeline.facts().get("kernels_compiled", 0))
        return result

    def _as_json(self, result: GenerationResult) -> Response:
        headers = _headers(result)
        return JSONResponse(render.to_json(result, self.bucket), headers=headers)


def _as_image(result: GenerationResult) -> Response:
    (picture,) = render.encode(result)
    return Response(picture.data, media_type=picture.mime_type, headers=_headers(result))


def _require_one_picture(request: GenerateRequest) -> None:
    if request.num_images != 1:
        raise InvalidRequest(
            "num_images: /generate answers with one picture; ask /generate_json for several",
            field="num_images",
        )
    if request.return_type != "base64":
        raise InvalidRequest(
            "return_type: /generate answers with the picture itself; ask /generate_json for links",
            field="return_type",
        )


def _headers(result: GenerationResult) -> dict[str, str]:
    values = {
        "x-klein-request-id": result.id,
        "x-klein-seed": str(result.params.seed),
        "x-klein-speed": result.model.speed,
        "x-klein-timings": json.dumps(result.timings),
        "x-klein-warnings": json.dumps(list(result.warnings)),
        "x-klein-loras": json.dumps([asdict(report) for report in result.loras]),
    }
    too_long = json.dumps("too long for a header: ask /generate_json")
    return {k: v if len(v) <= HEADER_LIMIT else too_long for k, v in values.items()}


def _give_up(error: KleinError) -> None:
    """Loading failed after the preflight: end the server, since a restart would fail again."""
    log.error("klein cannot start: %s", error)
    if "BENTOML_CONTAINERIZED" not in os.environ:
        os.kill(os.getppid(), signal.SIGTERM)
    os._exit(1)


def _example(url: str) -> str:
    return (
        f"  curl -s -X POST {url}/generate -H 'content-type: application/json' \\\n"
        """    -d '{"prompt": "a portrait", "seed": 1}' -o a.png"""
    )
