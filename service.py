"""klein as a BentoML service: `bentoml serve service:Klein`."""

import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable
from functools import cached_property
from typing import Any, NoReturn, TypeVar

import bentoml
from bentoml._internal.container import BentoMLContainer
from bentoml._internal.server.http.traffic import TimeoutMiddleware
from bentoml._internal.server.http_app import log_exception
from bentoml.exceptions import BentoMLException
from PIL import Image
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from uvicorn.config import HTTP_PROTOCOLS

from klein import logs
from klein.app import build
from klein.app.filter import Filter
from klein.app.generator import Generator
from klein.app.metrics import Recorder
from klein.app.tracing import Tracing
from klein.app.webhooks import Webhooks
from klein.core import ImagePipeline
from klein.engine.engine import State
from klein.entrypoints.http.app import connect, create_app, middlewares, route_paths
from klein.entrypoints.http.border import Border, RealPaths
from klein.entrypoints.http.connections import BoundedProtocol
from klein.entrypoints.http.draining import Door, Draining
from klein.entrypoints.http.errors import on_bug, on_http_exception
from klein.entrypoints.http.generate import answer_with_image, answer_with_json
from klein.errors import KleinError
from klein.output.delivery import Bucket
from klein.output.marks import Marks
from klein.request.schema import GenerateRequest
from klein.settings import Settings

log = logging.getLogger("klein.service")

RECORDER = Recorder(
    lambda row: getattr(bentoml.metrics, row.kind)(row.name, row.doc, row.labels, **row.options)
)
LEAVE_SECONDS = 30.0
"""How long an unhealthy worker may take to deliver its answers."""

T = TypeVar("T")
Answer = Callable[[Generator, GenerateRequest, Request], Awaitable[Response]]


def _stop(error: KleinError) -> NoReturn:
    """End a start that cannot succeed with its one sentence."""
    logs.say(f"\nklein cannot start: {error}\n")
    sys.exit(1)


def _checked(read: Callable[[], T]) -> T:
    """What `read` gives; a setting that cannot work ends the start."""
    try:
        return read()
    except KleinError as error:
        _stop(error)


logs.setup(os.environ)
SETTINGS = _checked(lambda: Settings.from_env(os.environ))
APP = create_app()
DOOR = Door()

# BentoML starts uvicorn with its default protocol, and has no setting for another.
HTTP_PROTOCOLS["auto"] = f"{BoundedProtocol.__module__}:{BoundedProtocol.__qualname__}"


class BorderedService(bentoml.Service[T]):  # type: ignore[misc]
    """BentoML's service within klein's border, without its timeout, with klein's shape of errors.

    Its timeout never takes its timers back: each keeps about 5 KB for as long as a request may
    take, after every request of any route. klein's own deadlines hold instead.
    """

    @cached_property
    def openapi_spec(self) -> Any:
        """BentoML's own description; to make it takes 0.1 s in which nobody is answered."""
        return super().openapi_spec

    def to_asgi(self, is_main: bool = True) -> Starlette:
        """The app that a worker serves."""
        app: Starlette = super().to_asgi(is_main)
        kept = [each for each in app.user_middleware if each.cls is not TimeoutMiddleware]
        app.user_middleware = kept
        app.router.redirect_slashes = False
        app.add_exception_handler(HTTPException, on_http_exception)  # type: ignore[arg-type]
        app.add_exception_handler(Exception, on_bug)
        app.add_middleware(Border, routes=route_paths(APP, app))
        return app


@bentoml.service(
    name="klein",
    service_class=BorderedService,
    workers=1,
    resources={"gpu": 1},
    traffic={"timeout": SETTINGS.timeout + 60},
    logging={"access": {"enabled": False}},  # klein's border logs
    metrics={"duration": {"buckets": [0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0]}},
)
@bentoml.asgi_app(APP, name="web")
class Klein:
    """FLUX.2-klein with LoRAs."""

    @staticmethod
    def load() -> ImagePipeline:
        """The pipeline of the settings; imports torch only now, in the worker."""
        return build.loader(SETTINGS, os.environ)()

    @staticmethod
    def request_restart(error: KleinError) -> None:
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
            build.loader(SETTINGS, os.environ)
            Bucket.from_settings(SETTINGS)
            Webhooks.from_settings(SETTINGS)
            Marks.from_settings(SETTINGS)
            Filter.from_settings(SETTINGS)
        except KleinError as error:
            _stop(error)

    def __init__(self) -> None:
        _log_as_bentoml_does()
        provider = BentoMLContainer.tracer_provider.get()
        self.generator = build.generator(
            SETTINGS,
            self._load_and_greet,
            on_load_failed=_give_up,
            on_unhealthy=self.request_restart,
            recorder=RECORDER,
            tracing=Tracing(provider.get_tracer("klein")),
        )
        connect(APP, self.generator)
        Draining(
            DOOR,
            lambda: APP.state.jobs.under_way,
            lambda: self.generator.engine.state is State.LOADING,
            SETTINGS.timeout + LEAVE_SECONDS,
        ).install()

    def _load_and_greet(self) -> ImagePipeline:
        log.info("loading %s", SETTINGS.model_id)
        pipeline = self.load()
        gc.collect()
        gc.freeze()  # or each full collection walks all of torch, and stops everything for 0.2 s
        url = f"http://localhost:{_port()}"
        log.info("%s is ready at %s; try:\n\n%s\n", SETTINGS.model_id, url, _example(url))
        if not (SETTINGS.api_keys or SETTINGS.api_keys_file):
            log.info("everybody who can reach it may use it: KLEIN_API_KEYS would ask for a key")
        return pipeline

    def __is_ready__(self) -> bool:
        return self.generator.is_ready

    @bentoml.on_shutdown
    def shutdown(self) -> None:
        """Free the GPU: running jobs end at their next step."""
        self.generator.stop()

    @bentoml.api(input_spec=GenerateRequest)
    async def generate(self, ctx: bentoml.Context, **params: Any) -> Image.Image:
        """One image, as a file in the format asked for, its parameters inside.

        Seed, request id, LoRAs, warnings and timings are in the `x-klein-…` headers.
        """
        return await self._answer(ctx, params, answer_with_image)  # type: ignore[return-value]

    @bentoml.api(input_spec=GenerateRequest)
    async def generate_json(self, ctx: bentoml.Context, **params: Any) -> dict[str, Any]:
        """Images as base64 or links, with all there is to know about how they were made."""
        return await self._answer(ctx, params, answer_with_json)  # type: ignore[return-value]

    async def _answer(
        self, ctx: bentoml.Context, params: dict[str, Any], answer: Answer
    ) -> Response:
        asked = GenerateRequest.model_validate(params)
        given = await answer(self.generator, asked, ctx.request)
        ctx.response.status_code = given.status_code  # BentoML would make it 200
        return given


def _give_up(error: KleinError) -> None:
    """Loading failed after the preflight: end the server, since a restart would fail again."""
    log.error("klein cannot start: %s", error)
    if "BENTOML_CONTAINERIZED" not in os.environ:
        os.kill(os.getppid(), signal.SIGTERM)
    os._exit(1)


def _log_as_bentoml_does() -> None:
    """klein's loggers write where BentoML's do, in the same form."""
    theirs, ours = logging.getLogger("bentoml"), logging.getLogger("klein")
    ours.handlers, ours.propagate = theirs.handlers, False
    ours.setLevel(theirs.level)
    logging.getLogger(log_exception.__module__).addFilter(_without_callers_faults)


def _without_callers_faults(record: logging.LogRecord) -> bool:
    """What is wrong with a request is no error of the server's: one line without a stack, which
    would show parts of it."""
    error = record.exc_info[1] if record.exc_info else None
    refused = isinstance(error, BentoMLException) and error.error_code.value < 500
    if refused or isinstance(error, ValidationError):
        record.levelno, record.levelname = logging.INFO, "INFO"
        record.exc_info = None
        record.msg = "refused: " + str(record.msg).removeprefix("Exception on ")
    return True


def _port() -> int:
    """The port this worker answers on: BentoML hands it the listening socket as `--fd N`."""
    try:
        fd = int(sys.argv[sys.argv.index("--fd") + 1])
        with socket.socket(fileno=os.dup(fd)) as listening:
            return int(listening.getsockname()[1])
    except (ValueError, IndexError, OSError):
        return int(os.environ.get("BENTOML_PORT") or os.environ.get("PORT") or 3000)


def _example(url: str) -> str:
    return (
        f"  {url}/ui in a browser, or\n"
        f"  curl -s -X POST {url}/generate -H 'content-type: application/json' \\\n"
        """    -d '{"prompt": "a portrait", "seed": 1}' -o a.png"""
    )


Klein.add_asgi_middleware(RealPaths)  # type: ignore[attr-defined]
for _middleware, _options in _checked(lambda: middlewares(SETTINGS, DOOR)):
    Klein.add_asgi_middleware(_middleware, **_options)  # type: ignore[attr-defined]
