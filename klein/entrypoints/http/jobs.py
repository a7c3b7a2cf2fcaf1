"""Jobs over HTTP, in Replicate's words: made, watched, cancelled, fetched later."""

import asyncio
import contextlib
import re
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field, HttpUrl
from starlette.responses import JSONResponse, Response

from klein.app.job import WEBHOOK_EVENTS, Job, JobSpec, Status, WebhookEvent
from klein.app.jobs import JobRegistry
from klein.entrypoints.http.errors import ErrorDetail, described
from klein.entrypoints.http.events import EventStream, last_event_id, lines_after
from klein.errors import InvalidRequest, NotReady
from klein.request.formats import FORMATS
from klein.request.schema import GenerateRequest

router = APIRouter(tags=["jobs"])

MAX_WAIT = 60
"""Seconds of `Prefer: wait`, at most."""
MAX_PAGE = 100
MAX_IMAGES = 1000
IMAGES: dict[int | str, dict[str, Any]] = {
    200: {"content": {row.mime_type: {} for row in FORMATS.values()}}
}
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}},
    204: {"description": "There are no events after `Last-Event-ID`."},
}

JobId = Annotated[
    str, Path(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="letters, digits, `_` and `-`")
]
Prefer = Annotated[
    str | None,
    Header(max_length=200, description="`wait=N` waits up to N (1 to 60) seconds for the end"),
]


class JobRequest(BaseModel):
    """A job to do."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: GenerateRequest = Field(
        description="what to draw; without `return_type` its images are links to this server"
    )
    webhook: HttpUrl | None = Field(None, description="an https address that is told of the job")
    webhook_events_filter: tuple[WebhookEvent, ...] = Field(
        WEBHOOK_EVENTS, max_length=2, description="of what it is told"
    )
    previews: bool = Field(
        True, description="whether small images are sent while it is drawn; none with a filter"
    )


class JobAnswer(BaseModel):
    """A job as it is told; times are ISO 8601 in UTC, addresses are paths of this server."""

    id: str
    status: Status
    input: dict[str, Any] = Field(description="what was asked, without the bytes of images")
    output: dict[str, Any] | None = Field(description="the answer of /generate_json")
    data_removed: bool = Field(description="whether its images gave way to newer ones")
    error: ErrorDetail | None
    queue_position: int | None = Field(description="from 1, while it waits")
    progress: dict[str, Any] | None
    seconds_left: float | None
    created_at: str
    started_at: str | None
    completed_at: str | None
    metrics: dict[str, float]
    webhook: dict[str, Any] | None
    urls: dict[str, str]


class JobPage(BaseModel):
    """Some of a caller's jobs, and the path of the next ones."""

    results: list[JobAnswer]
    next: str | None


ENDED: dict[int | str, dict[str, Any]] = {200: {"model": JobAnswer, "description": "It has ended."}}


@router.post(
    "/jobs",
    status_code=202,
    response_model=JobAnswer,
    responses=ENDED | described(400, 408, 429, 503),
)
async def create_job(request: Request, body: JobRequest, prefer: Prefer = None) -> Response:
    """Start a job: 202, or 200 if it ended within `Prefer: wait=N` seconds."""
    return await _create(request, body, prefer, None)


@router.put(
    "/jobs/{id}",
    status_code=202,
    response_model=JobAnswer,
    responses=ENDED | described(400, 408, 409, 429, 503),
)
async def put_job(request: Request, id: JobId, body: JobRequest, prefer: Prefer = None) -> Response:
    """Start a job of your own id. The same body again is the same job, another one 409."""
    return await _create(request, body, prefer, id)


@router.get("/jobs", response_model=JobPage, responses=described(400, 503))
async def list_jobs(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 20,
    before: Annotated[int | None, Query(ge=1, le=2**53, description="from `next`")] = None,
) -> Response:
    """Your jobs, the newest first."""
    jobs, older = _registry(request).page(_caller(request), limit, before)
    link = None if older is None else f"/jobs?limit={limit}&before={older}"
    return JSONResponse({"results": [job.as_dict() for job in jobs], "next": link})


@router.get("/jobs/{id}", response_model=JobAnswer, responses=described(400, 404, 503))
async def get_job(request: Request, id: JobId) -> Response:
    """A job as it is now."""
    return await _answer(_registry(request).get(_caller(request), id))


@router.post(
    "/jobs/{id}/cancel", response_model=JobAnswer, responses=described(400, 404, 408, 409, 503)
)
async def cancel_job(request: Request, id: JobId) -> Response:
    """Stop a job within one step; 409 if it is over."""
    return await _answer(await _registry(request).cancel(_caller(request), id))


@router.get(
    "/jobs/{id}/events",
    response_class=Response,
    responses=EVENTS | described(400, 404, 429, 503),
)
async def job_events(
    request: Request,
    id: JobId,
    resume_at: Annotated[str | None, Header(alias="Last-Event-ID", max_length=100)] = None,
) -> Response:
    """Server-sent events until the job's end: `status`, `progress`, `preview`, and one of
    `completed`, `failed` and `canceled`; 204 if there are none after `Last-Event-ID`."""
    registry, owner = _registry(request), _caller(request)
    job, after = registry.get(owner, id), last_event_id(resume_at)
    if job.over and not job.events.after(after):
        return Response(status_code=204)  # which ends a browser's attempts to come back
    registry.require_stream(owner)
    return EventStream(lines_after(job.events, after), registry.stream(owner))


@router.get(
    "/jobs/{id}/images/{n}",
    response_class=Response,
    responses=IMAGES | described(400, 404, 503),
)
async def job_image(
    request: Request, id: JobId, n: Annotated[int, Path(ge=0, le=MAX_IMAGES)]
) -> Response:
    """One image of a job, counted from 0."""
    image = _registry(request).image(_caller(request), id, n)
    headers = {"x-klein-seed": str(image.seed), "cache-control": "private"}
    return Response(image.data, media_type=image.mime_type, headers=headers)


async def _create(
    request: Request, body: JobRequest, prefer: str | None, id: str | None
) -> Response:
    wait = _seconds_to_wait(prefer)
    spec = JobSpec(
        request=body.input,
        previews=body.previews,
        webhook=str(body.webhook) if body.webhook else None,
        webhook_events=body.webhook_events_filter,
    )
    job = await _registry(request).create(_caller(request), spec, id)
    headers = {"location": f"/jobs/{job.id}"}
    if wait:
        headers["preference-applied"] = f"wait={wait}"
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(job.finished.wait(), wait)
    return await _answer(job, 200 if job.over else 202, headers)


async def _answer(job: Job, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    def render() -> Response:
        return JSONResponse(job.as_dict(inline=True), status_code=status, headers=headers)

    return await asyncio.to_thread(render) if job.inline else render()


def _seconds_to_wait(prefer: str | None) -> int:
    """Of a header such as `wait=10`; plain `wait` is the most. Raises InvalidRequest."""
    found = re.search(r"(?:^|[,;\s])wait\b(?:\s*=\s*([^,;\s]*))?", prefer or "", re.IGNORECASE)
    if found is None:
        return 0
    text = found[1] if found[1] is not None else str(MAX_WAIT)
    if not re.fullmatch(r"[0-9]{1,3}", text) or not 1 <= int(text) <= MAX_WAIT:
        raise InvalidRequest(f"Prefer: wait must be 1 to {MAX_WAIT} seconds", field="Prefer")
    return int(text)


def _registry(request: Request) -> JobRegistry:
    registry: JobRegistry | None = request.app.state.jobs
    if registry is None:
        raise NotReady("klein is starting: try again in a minute")
    return registry


def _caller(request: Request) -> str | None:
    """The name of the key that the request came with, None where there are no keys."""
    caller: Any = getattr(request.state, "caller", None)
    return None if caller is None else str(caller)
