"""klein as a RunPod Serverless worker: `python -m klein.runpod`.

Nothing but answers leaves the handler: the SDK would send a raised exception to the caller with
its traceback, host and worker id. Progress goes out in order and stops before the result does,
since RunPod keeps a job IN_PROGRESS whose progress arrives last. A worker whose memory cannot be
freed says so beside its answer, and RunPod replaces it.
"""

import asyncio
import logging
import os
import re
import signal
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from klein import logs
from klein.app import build
from klein.app.generator import Generator
from klein.core import Preview, PreviewRequest, Progress
from klein.engine.engine import State
from klein.errors import InternalError, InvalidRequest, KleinError
from klein.output import images, response
from klein.output.images import PREVIEW_EVERY
from klein.request.schema import parse
from klein.settings import Settings

log = logging.getLogger(__name__)

RunpodJob = dict[str, Any]
Send = Callable[[RunpodJob, dict[str, Any]], Awaitable[None]]
PROGRESS_EVERY = 1.0
"""Seconds between two progress posts of a job."""
POST_SECONDS = 5.0
"""Of one post; a platform that hangs does not withhold a finished image."""
TERMINATED = 128 + signal.SIGTERM
"""What a program ended by SIGTERM exits with."""


class Worker:
    """Handles RunPod's jobs with a generator whose model is loaded."""

    def __init__(self, generator: Generator, send: Send) -> None:
        self._generator = generator
        self._send = send

    async def handle(self, runpod_job: RunpodJob) -> dict[str, Any]:
        """The answer to one job: that of `generate_json`, or an `error` string with its code.

        `refresh_worker`, which the SDK takes out, asks RunPod to replace an unhealthy worker, and
        one whose filter hangs in every thread.
        """
        request_id = re.sub(r"[^\w-]", "_", str(runpod_job.get("id", "")))[:64]
        answer = await self._answer(runpod_job, request_id)
        is_stuck = self._generator.filter is not None and self._generator.filter.is_stuck
        if is_stuck or self._generator.engine.state is State.UNHEALTHY:
            answer["refresh_worker"] = True
        return answer

    async def _answer(self, runpod_job: RunpodJob, request_id: str) -> dict[str, Any]:
        try:
            return await self._generate(runpod_job, request_id)
        except KleinError as error:
            return _failure(error, request_id)
        except Exception:
            log.exception("job %s failed", request_id)
            return _failure(InternalError("klein failed: see the worker's log"), request_id)

    async def _generate(self, runpod_job: RunpodJob, request_id: str) -> dict[str, Any]:
        data = runpod_job.get("input")
        if not isinstance(data, dict):
            raise InvalidRequest("input: send an object such as {'prompt': 'a portrait'}")
        wants_previews = _wants_previews(data)
        request = parse({name: value for name, value in data.items() if name != "progress"})
        xmp = self._generator.marks.xmp(request)
        async with _ProgressFeed(lambda update: self._send(runpod_job, update), xmp) as feed:
            previews = PreviewRequest(feed.show, every=PREVIEW_EVERY) if wants_previews else None
            context = self._generator.context(request_id, feed.push, previews)
            generated = await self._generator.run(request, context)
        return await self._generator.lanes.delivery.run(
            partial(
                response.to_json_within,
                generated.result,
                generated.delivery,
                generated.marks,
                self._generator.bucket,
                self._generator.settings.max_response_mb * 1e6,
            )
        )


def _wants_previews(data: dict[str, Any]) -> bool:
    """Whether the input's `progress` asks for images on the way; raises InvalidRequest."""
    asked = data.get("progress", "steps")
    if asked not in ("steps", "previews"):
        raise InvalidRequest("progress: must be 'steps' or 'previews'", field="progress")
    return bool(asked == "previews")


class _ProgressFeed:
    """Posts the newest progress about once a second; leaving it waits for the post in flight."""

    def __init__(self, send: Callable[[dict[str, Any]], Awaitable[None]], xmp: bytes) -> None:
        self._send = send
        self._xmp = xmp
        self._newest: Progress | None = None
        self._preview: Preview | None = None
        self._news = asyncio.Event()
        self._closing = asyncio.Event()

    async def __aenter__(self) -> "_ProgressFeed":
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(self._pump())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closing.set()
        self._news.set()
        await self._task

    def push(self, progress: Progress) -> None:
        """Callable from any thread."""
        self._newest = progress
        self._loop.call_soon_threadsafe(self._news.set)

    def show(self, preview: Preview) -> None:
        """The newest preview goes out with the next update; callable from any thread."""
        self._preview = preview

    async def _pump(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            if self._closing.is_set():
                return
            if self._newest is not None:
                await self._post(self._newest)
            try:
                await asyncio.wait_for(self._closing.wait(), PROGRESS_EVERY)
            except TimeoutError:
                continue

    async def _post(self, progress: Progress) -> None:
        update = {
            "stage": progress.stage,
            "step": progress.step,
            "steps": progress.steps,
            "image": progress.image,
            "images": progress.images,
            "percent": round(100 * progress.fraction),
        }
        preview, self._preview = self._preview, None
        if preview is not None:
            update["preview"] = await asyncio.to_thread(
                images.preview_uri, preview.picture, self._xmp
            )
        try:
            await asyncio.wait_for(self._send(update), POST_SECONDS)
        except Exception as error:  # progress is a courtesy: a job must not fail for it
            log.warning("progress was not delivered (%s)", type(error).__name__)


def _failure(error: KleinError, request_id: str) -> dict[str, Any]:
    """RunPod keeps `error` only if it is a string; the rest arrives as the job's output."""
    return {**error.as_dict(request_id), "error": f"{error.code}: {error}"}


async def _post_progress(runpod_job: RunpodJob, update: dict[str, Any]) -> None:
    """Post through the SDK's own session, in this loop, one at a time."""
    if "RUNPOD_WEBHOOK_POST_OUTPUT" not in os.environ:
        log.info("%s: %s %%", runpod_job.get("id"), update["percent"])
        return
    from runpod.http_client import AsyncClientSession
    from runpod.serverless.modules.rp_http import send_result

    async with AsyncClientSession() as session:
        await send_result(session, {"status": "IN_PROGRESS", "output": update}, runpod_job)


def start_worker() -> Worker:
    """Load the model of the environment's settings; raises KleinError.

    The SDK, whose import takes over a second, is imported while the weights are read.
    """
    settings = Settings.from_env(os.environ)
    generator = build.generator(settings, build.loader(settings, os.environ))
    import runpod  # noqa: F401

    generator.engine.wait_ready()
    return Worker(generator, _post_progress)


def main() -> None:
    """Load, then hand the handler to RunPod's SDK, which reads its own flags.

    While RunPod replaces a worker the SDK would take another job, which could only be refused:
    `refresh_worker` in its configuration ends its loop once the answer is posted.
    """
    os.environ.setdefault("RUNPOD_LOG_LEVEL", "INFO")  # its default prints whole results
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logs.setup(os.environ)
    # While a model loads nothing is under way. The default would not do: the first process of a
    # container never hears of it. Afterwards the SDK has a handler of its own.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(TERMINATED))
    try:
        worker = start_worker()
    except KleinError as error:
        logs.say(f"\nklein cannot start: {error}\n")
        sys.exit(1)
    import runpod

    async def handler(job: RunpodJob) -> dict[str, Any]:
        answer = await worker.handle(job)
        config["refresh_worker"] = "refresh_worker" in answer
        return answer

    config: dict[str, Any] = {"handler": handler}
    runpod.serverless.start(config)
