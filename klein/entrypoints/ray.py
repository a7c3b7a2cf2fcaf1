"""klein on Ray Serve: `klein serve --replicas N`, or `serve run klein.entrypoints.ray:app`.

Two deployments. `Ingress` is klein's HTTP app with the one queue, and never imports torch;
`Replica` is one GPU with klein's engine. Settings are the environment; how many replicas there are
and what each takes is Ray's own configuration, of which docs/ray-serve.yaml is an example.
"""

import asyncio
import logging
import os
import queue
import signal
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any

import prometheus_client
import ray
from fastapi import APIRouter, FastAPI
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from klein.app import build
from klein.app.fleet import Fleet, FleetGenerator, ReplicaLost
from klein.app.jobs import JobRegistry
from klein.app.metrics import Recorder
from klein.app.replica import Hello, Message, Order, Replica
from klein.engine.engine import State
from klein.entrypoints.http.app import connect, create_app, middlewares
from klein.entrypoints.http.draining import LOOK_SECONDS, Door
from klein.models.catalog import known
from klein.output.delivery import Bucket
from klein.settings import Settings

log = logging.getLogger(__name__)

NAME = "klein"
"""Of the application."""
LEAVE_SECONDS = 30.0
"""That a replica may take beyond KLEIN_TIMEOUT to finish what it has, when it is to end."""
MANY = 10_000
"""Calls that a deployment takes at once, and jobs a replica: the ingress's queue bounds them."""
STATIC = "_internal/server/static_content"
"""BentoML's copy of the files of `/docs`."""
ONE_LOOP = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
"""The ingress never blocks, so that it can do without Ray's threads between HTTP and replicas."""
HELLO_SECONDS = 5.0
"""A replica may take to say how it is."""


class RayReplica:
    """The deployment `Replica`: klein's engine on one GPU."""

    def __init__(self) -> None:
        _log_as_ray_does()
        settings = replace(Settings.from_env(os.environ), queue_size=MANY)
        generator = build.generator(settings, build.loader(settings, os.environ))
        generator.engine.wait_ready()
        id = serve.get_replica_context().replica_id.unique_id
        self._replica = Replica(id, ray.get_runtime_context().get_node_id(), generator)

    async def draw(self, worker: str, order: Order) -> AsyncIterator[Message]:
        """As Replica.draw; `worker` is for the router."""
        async with aclosing(self._replica.draw(order)) as messages:
            async for message in messages:
                yield message

    async def cancel(self, id: str) -> None:
        """As Replica.cancel."""
        self._replica.cancel(id)

    async def hello(self) -> Hello:
        """As Replica.hello."""
        return self._replica.hello()

    def check_health(self) -> None:
        """Raise if Ray must put another replica in this one's place; one that hangs ends itself,
        for Ray would wait until it is free."""
        if self._replica.hangs:
            log.critical("a job does not end: this replica ends itself")
            os._exit(1)
        if self._replica.state is not State.READY:
            raise RuntimeError(f"klein is {self._replica.state}")


class ToNamedReplica(RequestRouter):  # type: ignore[misc]
    """Sends a call to the replica that its first argument names: the fleet has chosen it. A call
    for one that has left in this moment goes to any."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The named replica, as the only rank."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # else Ray asks again without a pause
        name = pending_request.args[0]
        named = [each for each in candidate_replicas if each.replica_id.unique_id == name]
        return [named or candidate_replicas]


class RayReplicas:
    """The way to the replicas: a handle of Ray's."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._draw = handle.options(method_name="draw", stream=True)

    async def draw(self, worker: str, order: Order) -> AsyncIterator[Message]:
        """What replica `worker` says of `order`; raises ReplicaLost."""
        try:
            async for message in self._draw.remote(worker, order):
                yield message
        except RayTaskError:
            raise
        except (RayError, RayServeException) as error:
            raise ReplicaLost(type(error).__name__) from error

    async def cancel(self, id: str) -> None:
        """Stop an order at its next step, wherever it is drawn."""
        await self._ask_all("cancel", id)

    async def hello(self) -> list[Hello]:
        """Every replica that takes orders."""
        answers = await self._ask_all("hello")
        return [answer for answer in answers if isinstance(answer, Hello)]

    async def _ask_all(self, method: str, *args: str) -> list[Any]:
        asked = self._handle.broadcast(method, *args)
        answers: list[Any] = await asked.results_async(
            timeout_s=HELLO_SECONDS, return_exceptions=True
        )
        return answers


class Ingress:
    """The deployment `Ingress`: the app, and the queue of all replicas."""

    def __init__(self, handle: Any) -> None:
        _log_as_ray_does()
        settings = Settings.from_env(os.environ)
        self._registry = prometheus_client.CollectorRegistry()
        fleet = Fleet(RayReplicas(handle), queue_size=settings.queue_size)
        bucket = Bucket.from_settings(settings)
        recorder = Recorder(self._metric)
        library = build.library(settings, recorder)
        self._generator = FleetGenerator(fleet, library, settings, bucket, recorder)
        self._registry.register(FleetMetrics(fleet))
        self._door = Door()
        fleet.start()

    def _metric(self, row: Any) -> Any:
        kind = getattr(prometheus_client, row.kind)
        return kind(row.name, row.doc, row.labels, registry=self._registry, **row.options)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The app as everywhere, and what BentoML's server adds to it elsewhere."""
        app = create_app()
        connect(app, self._generator)
        self._jobs: JobRegistry = app.state.jobs
        ends = app.router.lifespan_context

        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[Mapping[str, Any]]:
            async with ends(app) as state:
                yield state or {}
                await self.drain()

        app.router.lifespan_context = lifespan
        for middleware, options in reversed(middlewares(self._generator.settings, self._door)):
            app.add_middleware(middleware, **options)
        app.include_router(self._probes())
        app.mount("/static_content", StaticFiles(packages=[("bentoml", STATIC)]))
        return app

    async def drain(self) -> None:
        """Refuse what comes; returns when no request and no job is under way, or after
        KLEIN_TIMEOUT."""
        self._door.closed = True
        until = time.monotonic() + self._generator.settings.timeout
        while (self._door.under_way or self._jobs.under_way) and time.monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(LOOK_SECONDS)

    def _probes(self) -> APIRouter:
        router = APIRouter(include_in_schema=False)

        @router.get("/livez")
        async def alive() -> Response:
            return Response()

        @router.get("/readyz")
        async def ready() -> Response:
            is_ready = self._generator.engine.state is State.READY
            return Response(status_code=200 if is_ready else 503)

        @router.get("/metrics")
        async def metrics() -> Response:
            text = prometheus_client.generate_latest(self._registry)
            return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

        return router


class FleetMetrics:
    """The replicas for Prometheus: those that there are when it asks."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterator[Metric]:
        """Every metric with its samples."""
        jobs = GaugeMetricFamily("klein_replica_jobs", "jobs a replica has", labels=["replica"])
        warm = GaugeMetricFamily(
            "klein_replica_warm",
            "1 for each LoRA set that a replica drew lately",
            labels=["replica", "loras"],
        )
        for replica, count in self._fleet.load().items():
            jobs.add_metric([replica], count)
        for replica, sets in self._fleet.warm().items():
            for loras in sets:
                warm.add_metric([replica, loras], 1)
        routed = CounterMetricFamily(
            "klein_routed",
            "jobs by their LoRAs where they went: the `same`, `warm`, `near` (on disk) or `cold`",
            labels=["loras"],
        )
        for warmth, count in self._fleet.routing.routed.items():
            routed.add_metric([warmth], count)
        again = self._fleet.routing.drawn_again
        yield from (jobs, warm, routed)
        yield CounterMetricFamily("klein_drawn_again", "jobs whose replica was lost", value=again)


def app(args: dict[str, Any]) -> Any:
    """The application for `serve run` and for a config file; `replicas` is the one argument, and
    what the file says of the deployments goes before it."""
    settings = Settings.from_env(os.environ)
    shared = {
        "max_ongoing_requests": MANY,
        "graceful_shutdown_timeout_s": settings.timeout + LEAVE_SECONDS,
    }
    replica = serve.deployment(
        RayReplica,
        name="Replica",
        num_replicas=int(args.get("replicas", 1)),
        ray_actor_options={"num_cpus": 1, "num_gpus": int(needs_gpu(settings))},
        request_router_config=RequestRouterConfig(
            request_router_class=f"{__name__}:{ToNamedReplica.__name__}"
        ),
        logging_config={"enable_access_log": False},  # each is asked once a second how it is
        **shared,
    )
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name="Ingress",
        ray_actor_options={"num_cpus": 1, "runtime_env": _with_variables(ONE_LOOP)},
        **shared,
    )
    return ingress.bind(replica.bind())


def _with_variables(variables: dict[str, str]) -> dict[str, Any]:
    """The application's runtime environment, and `variables`: a deployment that names one of its
    own gets none of the application's from Ray, neither its keys nor anything else."""
    inherited = dict(ray.get_runtime_context().runtime_env)
    return {**inherited, "env_vars": {**inherited.get("env_vars", {}), **variables}}


def needs_gpu(settings: Settings) -> bool:
    """Whether a replica of these settings takes a GPU."""
    model = known(settings.model_id)
    return settings.device != "cpu" and (model is None or model.needs_gpu)


def run(replicas: int, host: str, port: int) -> None:
    """Serve from this machine, by a Ray of its own, until SIGINT or SIGTERM; then drain."""
    cpus = max(os.cpu_count() or 1, replicas + 1)  # Ray's own count of what may be started
    ray.init(address="local", num_cpus=cpus, include_dashboard=False)
    serve.start(http_options={"host": host, "port": port})
    ingress = serve.run(app({"replicas": replicas}), name=NAME)
    asked = queue.SimpleQueue[int]()  # by signals, whose handlers ray.init has replaced
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: asked.put(number))
    print(f"klein is ready with {replicas} replicas: http://localhost:{port}/ui", flush=True)
    asked.get()
    _drain(ingress, asked)
    serve.shutdown()
    ray.shutdown()


def _drain(ingress: Any, asked: "queue.SimpleQueue[int]") -> None:
    """Until nothing is under way, or somebody asks once more."""
    print("klein finishes what is under way; a second signal does not wait", flush=True)
    draining = ingress.drain.remote()
    while asked.empty():
        try:
            draining.result(timeout_s=LOOK_SECONDS)
            return
        except TimeoutError:
            continue
        except (RayError, RayServeException) as error:
            log.warning("the ingress could not be drained: %s", error)
            return


def _log_as_ray_does() -> None:
    """klein's loggers write where Ray Serve's do, in the same form."""
    theirs, ours = logging.getLogger("ray.serve"), logging.getLogger("klein")
    ours.handlers, ours.propagate = theirs.handlers, False
    ours.setLevel(theirs.level)
