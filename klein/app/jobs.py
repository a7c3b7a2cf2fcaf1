"""Jobs that outlive the call that made them: a bounded registry over one generator.

A job's way: `create` finds it a place in the queue or refuses it · its task runs the generator ·
what is heard of it on the way becomes events · when its task ends, however it does, the job gets
its one terminal status · its images are kept for a bounded time and size.

Everything here belongs to one event loop; progress and previews hop to it from the GPU's thread.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

from klein import logs
from klein.app.generator import Generated, Generator
from klein.app.job import LAST_EVENTS, Job, JobSpec, Output, Status, WebhookEvent, told_input
from klein.app.webhooks import Webhooks
from klein.core import (
    GenerationParams,
    Preview,
    PreviewRequest,
    Progress,
    RequestContext,
    new_id,
)
from klein.errors import (
    Cancelled,
    Conflict,
    InternalError,
    InvalidRequest,
    KleinError,
    NotFound,
    NotReady,
    QueueFull,
)
from klein.output import response
from klein.output.images import PREVIEW_EVERY, preview_uri
from klein.output.response import EncodedImage

log = logging.getLogger(__name__)

MAX_JOBS = 1000
"""Jobs that are known, finished ones with them; the oldest of those go first."""
FETCH_EVERY = 0.5
"""Seconds between two reports on a LoRA that is being fetched."""


class JobRegistry:
    """The jobs of one server, each seen by its owner only."""

    def __init__(self, generator: Generator, webhooks: Webhooks | None = None) -> None:
        self.settings = generator.settings
        self.webhooks = webhooks
        self._generator = generator
        self._loop: asyncio.AbstractEventLoop | None = None
        self._jobs: dict[tuple[str | None, str], Job] = {}
        self._created = 0
        self._stopping = False
        self._streams: dict[str | None, int] = {}
        generator.engine.on_change(lambda: self._hop(self._look_at_queue))

    async def create(self, owner: str | None, spec: JobSpec, id: str | None = None) -> Job:
        """A new job, or the one that `id` names already if it was made by the same body.

        Raises Conflict for another body, InvalidRequest, NotReady or QueueFull.
        """
        self._loop = asyncio.get_running_loop()
        job = self._jobs.get((owner, id)) if id else None
        if job is None:
            job = self._start(owner, spec, id)
        elif job.fingerprint != spec.fingerprint:
            raise Conflict(f"id: {id!r} is another job's already: take a new one", field="id")
        await self._accept(job)
        return job

    def get(self, owner: str | None, id: str) -> Job:
        """Raises NotFound for what is not the owner's."""
        job = self._jobs.get((owner, id))
        if job is None or not job.accepted:
            raise NotFound(
                f"there is no job {id!r}, or no more: jobs are kept for "
                f"{self.settings.jobs_keep_seconds:g} seconds after their end",
                field="id",
            )
        return job

    def page(
        self, owner: str | None, limit: int, before: int | None
    ) -> tuple[list[Job], int | None]:
        """The owner's jobs from the newest on, those older than `before`, and the next `before`."""
        found = [
            job
            for job in reversed(self._jobs.values())
            if job.owner == owner and job.accepted and (before is None or job.number < before)
        ]
        return found[:limit], found[limit - 1].number if len(found) > limit else None

    async def cancel(self, owner: str | None, id: str) -> Job:
        """Stop a job and return once the GPU is free of it; raises Conflict if it is over."""
        job = self.get(owner, id)
        if not job.over:
            if not job.cancel_asked:
                job.cancel_asked = True
                job.task.cancel()
            await job.finished.wait()
            if job.status is Status.CANCELED:
                return job
        raise Conflict(f"job {id!r} is over: it has {job.status}", field="id")

    def image(self, owner: str | None, id: str, number: int) -> EncodedImage:
        """Image `number`, from 0; raises NotFound."""
        job = self.get(owner, id)
        images = job.output.images if job.output else ()
        if number < len(images):
            return images[number]
        why = f"it has {len(images)} here" if job.over else f"it is still {job.status}"
        if job.images_dropped:
            why = f"it gave way to newer ones: KLEIN_JOBS_KEEP_MB is {self.settings.jobs_keep_mb:g}"
        raise NotFound(f"job {id!r} has no image {number}: {why}", field="n")

    def require_stream(self, owner: str | None) -> None:
        """Raise QueueFull if the owner follows as many jobs as it may."""
        most = self.settings.event_streams
        if self._streams.get(owner, 0) >= most:
            raise QueueFull(
                f"{most} event streams are open already: close one, or raise KLEIN_EVENT_STREAMS"
            )

    @contextlib.contextmanager
    def stream(self, owner: str | None) -> Iterator[None]:
        """Counts an open event stream."""
        self._streams[owner] = self._streams.get(owner, 0) + 1
        try:
            with self._generator.streaming():
                yield
        finally:
            self._streams[owner] -= 1
            if not self._streams[owner]:
                del self._streams[owner]

    async def stop(self) -> None:
        """End every job and its streams, and deliver what can be delivered quickly."""
        self._stopping = True
        live = [job for job in self._jobs.values() if not job.over]
        for job in live:
            job.task.cancel()
        await asyncio.gather(*(job.finished.wait() for job in live))
        if self.webhooks is not None:
            await self.webhooks.stop()

    # -- a job's beginning ---------------------------------------------------------------------

    def _start(self, owner: str | None, spec: JobSpec, id: str | None) -> Job:
        self._require_room(spec)
        own = new_id()
        self._created += 1
        job = Job(
            owner=owner,
            id=id or own,
            number=self._created,
            fingerprint=spec.fingerprint,
            input=told_input(spec.request),
            inline=spec.inline,
            webhook=spec.webhook,
            webhook_events=spec.webhook_events,
        )
        job.context = self._context(own, job, spec)
        self._jobs[owner, job.id] = job
        with logs.fields(job_id=job.id):
            job.task = asyncio.create_task(self._draw(job.id, spec, job.context))
        job.task.add_done_callback(partial(self._end, job))
        return job

    @property
    def under_way(self) -> int:
        """Jobs that are not over."""
        return sum(not job.over for job in self._jobs.values())

    def _require_room(self, spec: JobSpec) -> None:
        if self._stopping:
            raise NotReady("klein is shutting down: try another worker")
        if self.under_way >= MAX_JOBS:
            raise QueueFull(f"{MAX_JOBS} jobs are under way already: try again later")
        if spec.webhook is None:
            return
        if self.webhooks is None:
            raise InvalidRequest(
                "webhook: this server sends none: start klein with KLEIN_WEBHOOK_SECRET",
                field="webhook",
            )
        self.webhooks.require_allowed(spec.webhook)

    def _context(self, id: str, job: Job, spec: JobSpec) -> RequestContext:
        """A context whose progress and previews are heard in the loop."""
        told = 0.0

        def on_progress(progress: Progress) -> None:
            nonlocal told
            if progress.stage == "fetch":
                if time.monotonic() - told < FETCH_EVERY:
                    return
                told = time.monotonic()
            self._hop(self._on_progress, job, progress)

        receive = partial(self._hop, self._on_preview, job, self._generator.marks.xmp(spec.request))
        sent = spec.previews and self._generator.filter is None
        wanted = PreviewRequest(receive, every=PREVIEW_EVERY) if sent else None
        return self._generator.context(id, on_progress, wanted)

    async def _draw(self, id: str, spec: JobSpec, context: RequestContext) -> Output:
        generated = await self._generator.run(spec.request, context)
        return await self._generator.render(generated, partial(self._output, id, spec.links))

    def _output(self, id: str, links: bool, generated: Generated) -> Output:
        if generated.delivery.return_type == "url":
            made = (generated.result, generated.delivery, generated.marks, self._generator.bucket)
            return Output(response.to_json(*made), ())
        return _encode(id, generated, links)

    async def _accept(self, job: Job) -> None:
        """Let the first step of the job's task run, which finds it a place in the queue or
        raises why there is none; then the job never was."""
        try:
            await asyncio.sleep(0)
        finally:
            refusal = None if job.accepted else _refusal(job.task)
            if refusal is None and not job.accepted:
                job.accepted = True
                self._make_room()
                self._look_at_queue(newcomer=job)
        if refusal is not None:
            raise refusal

    # -- what is heard of it -------------------------------------------------------------------

    def _hop(self, call: Callable[..., None], *args: Any) -> None:
        """Call in the loop, from any thread; a loop that is gone has nobody left to tell."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(call, *args)

    def _look_at_queue(self, newcomer: Job | None = None) -> None:
        """Tell each job that waits of its position if that has changed, and who is drawn now."""
        queue, times = self._generator.engine.queue(), self._generator.step_times
        places = {job.context.id: (n, job.params) for n, job in enumerate(queue.waiting, 1)}
        drawn = {each.job.context.id: each.job.params for each in queue.running}
        for job in list(self._jobs.values()):
            if not job.accepted or job.status is not Status.STARTING:
                continue
            before = job.queue_position
            if job.context.id in drawn:
                self._on_start(job, drawn[job.context.id])
            elif job.context.id in places:
                job.queue_position, job.params = places[job.context.id]
                wait = times.wait(queue, job.queue_position - 1)
                own = times.seconds(job.params)
                job.expect(None if wait is None or own is None else wait + own)
            if job.status is Status.STARTING and (job is newcomer or job.queue_position != before):
                self._tell_status(job)

    def _on_start(self, job: Job, params: GenerationParams | None) -> None:
        job.status, job.started = Status.PROCESSING, job.age
        job.queue_position, job.params = None, params
        job.expect(self._generator.step_times.seconds(params) if params else None)
        self._tell_status(job)
        self._send(job, "start")

    def _on_progress(self, job: Job, progress: Progress) -> None:
        if job.over or not job.accepted:
            return
        fetching = progress.stage == "fetch"
        if job.status is Status.STARTING and not fetching:
            self._on_start(job, job.params)  # it was drawn before anybody looked at the queue
        if job.params is not None and not fetching:
            job.expect(self._generator.step_times.seconds(job.params, progress.fraction))
        job.progress = {**asdict(progress), "seconds_left": job.seconds_left}
        job.events.append("progress", job.progress)

    def _on_preview(self, job: Job, xmp: bytes, preview: Preview) -> None:
        if not job.over and job.accepted:
            told = {"step": preview.step, "steps": preview.steps, "image": preview.image}
            job.events.append("preview", {**told, "url": preview_uri(preview.picture, xmp)})

    def _tell_status(self, job: Job) -> None:
        job.events.append(
            "status",
            {
                "status": str(job.status),
                "queue_position": job.queue_position,
                "seconds_left": job.seconds_left,
            },
        )

    def _send(self, job: Job, event: WebhookEvent) -> None:
        if job.webhook is not None and self.webhooks is not None and event in job.webhook_events:
            id = f"{job.context.id}-{event}"
            delivery = self.webhooks.send(job.owner, job.webhook, id, event, job.as_dict())
            job.deliveries.append(delivery)

    # -- its end -------------------------------------------------------------------------------

    def _end(self, job: Job, task: "asyncio.Task[Output]") -> None:
        """Called once, when the job's task is done, however it was done."""
        job.finished.set()
        if not job.accepted:
            del self._jobs[job.owner, job.id]
            return
        error = Cancelled("the job was cancelled") if task.cancelled() else task.exception()
        if error is None:
            job.status, job.output = Status.SUCCEEDED, task.result()
        elif isinstance(error, Cancelled) and job.cancel_asked:
            job.status = Status.CANCELED
        else:
            job.status = Status.FAILED
            job.error = _klein_error(job, error).as_dict(job.context.id)
        del job.task
        job.ended, job.queue_position, job.due = job.age, None, None
        if job.started is None and job.output is not None:
            job.started = job.ended
        job.events.close(LAST_EVENTS[job.status], job.as_dict())
        self._send(job, "completed")
        self._drop_images()
        if self._loop is not None:
            keep = self.settings.jobs_keep_seconds
            job.expiry = self._loop.call_later(keep, self._forget, job)

    def _forget(self, job: Job) -> None:
        if self._jobs.get((job.owner, job.id)) is job:
            del self._jobs[job.owner, job.id]
            job.drop_images()
        if job.expiry is not None:
            job.expiry.cancel()  # or the loop would keep the job until then
            job.expiry = None

    def _make_room(self) -> None:
        """If there are too many jobs, forget the oldest finished one of the owner with the most."""
        if len(self._jobs) <= MAX_JOBS:
            return
        counts = Counter(owner for owner, _ in self._jobs)
        if over := [job for job in self._jobs.values() if job.over]:
            self._forget(max(over, key=lambda job: counts[job.owner]))

    def _drop_images(self) -> None:
        """Until the rest fit, drop the images of the owner who has most, those of its job that
        ended first; never those of the job that ended last."""
        kept = [job for job in self._jobs.values() if job.image_bytes]
        kept.sort(key=lambda job: job.context.submitted + (job.ended or 0.0))
        held = Counter[str | None]()
        for job in kept:
            held[job.owner] += job.image_bytes
        del kept[-1:]
        while kept and held.total() > self.settings.jobs_keep_mb * 1e6:
            job = max(kept, key=lambda job: held[job.owner])
            kept.remove(job)
            held[job.owner] -= job.image_bytes
            job.drop_images()


def _refusal(task: "asyncio.Task[Output]") -> KleinError | None:
    """Why a task that has just begun found no place."""
    if not task.done() or task.cancelled():
        return None
    error = task.exception()
    return error if isinstance(error, KleinError) else None


def _klein_error(job: Job, error: BaseException) -> KleinError:
    """What its owner is told of why a job failed."""
    if isinstance(error, Cancelled):
        return NotReady("klein was stopped before the job was done: ask another worker")
    if isinstance(error, KleinError):
        return error
    log.error("job %s failed", job.context.id, exc_info=error)
    return InternalError(f"{type(error).__name__} inside klein: see its log for {job.context.id}")


def _encode(id: str, generated: Generated, links: bool) -> Output:
    """The images as files, and the answer around them."""
    result, delivery = generated.result, generated.delivery
    images = response.encode(result, delivery, generated.marks)
    body = response.answer(
        result,
        delivery,
        generated.marks,
        images,
        lambda number, _: {"url": f"/jobs/{id}/images/{number}"},
    )
    if links:
        del body["parameters"]["return_type"]
    return Output(body, tuple(images))
