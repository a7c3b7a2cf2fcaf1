"""One job as its owner sees it: what was asked, how far it is, what came of it."""

import asyncio
import hashlib
import json
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Literal

from klein.app.events import EventLog
from klein.app.webhooks import Delivery
from klein.core import GenerationParams, RequestContext
from klein.output import response
from klein.output.response import EncodedImage
from klein.request.schema import GenerateRequest
from klein.sources.address import redacted

MAX_TEXT = 10_000
"""Characters of a text in `input` as the job tells it: longer ones are images."""


class Status(StrEnum):
    """Replicate's words."""

    STARTING = "starting"
    PROCESSING = "processing"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"


LAST_EVENTS = {
    Status.SUCCEEDED: "completed",
    Status.FAILED: "failed",
    Status.CANCELED: "canceled",
}
"""The event that ends a job, by the status it ends with."""
WebhookEvent = Literal["start", "completed"]
WEBHOOK_EVENTS: tuple[WebhookEvent, ...] = ("start", "completed")


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What a caller asks for: an image, whether to see previews of it, and whom to tell."""

    request: GenerateRequest
    previews: bool = True
    webhook: str | None = None
    webhook_events: tuple[WebhookEvent, ...] = WEBHOOK_EVENTS

    @property
    def links(self) -> bool:
        """Whether images are links to this server, which is so unless `return_type` is given."""
        return "return_type" not in self.request.model_fields_set

    @property
    def fingerprint(self) -> str:
        """Equal for equal bodies."""
        asked = self.request.model_dump(mode="json", exclude_unset=True)
        body = [asked, self.previews, self.webhook, self.webhook_events]
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

    @property
    def inline(self) -> bool:
        """Whether images were asked for in the answer itself."""
        return self.request.return_type == "base64" and not self.links


@dataclass(frozen=True, slots=True)
class Output:
    """A result as it is kept: `body` is the answer of generate_json, its images without bytes."""

    body: dict[str, Any]
    images: tuple[EncodedImage, ...]


@dataclass(eq=False, slots=True)
class Job:
    """One job of one `owner`.

    `started` and `ended` are seconds since `created`; `due` is when it should end, on the clock of
    time.monotonic. `error` is in the wire shape, since an exception would keep every frame that it
    went through, and `task` is gone at the end, since it would keep the images. `expiry` is when it
    will be forgotten, at the latest.
    """

    owner: str | None
    id: str
    number: int
    fingerprint: str
    input: dict[str, Any]
    inline: bool
    webhook: str | None
    webhook_events: tuple[WebhookEvent, ...]
    context: RequestContext = field(init=False)
    task: "asyncio.Task[Output]" = field(init=False)
    created: datetime = field(default_factory=lambda: datetime.now(UTC))
    events: EventLog = field(default_factory=EventLog)
    finished: asyncio.Event = field(default_factory=asyncio.Event)
    accepted: bool = False
    cancel_asked: bool = False
    status: Status = Status.STARTING
    params: GenerationParams | None = None
    queue_position: int | None = None
    due: float | None = None
    progress: dict[str, Any] | None = None
    output: Output | None = None
    images_dropped: bool = False
    error: dict[str, object] | None = None
    started: float | None = None
    ended: float | None = None
    deliveries: list[Delivery] = field(default_factory=list)
    expiry: asyncio.TimerHandle | None = None

    @property
    def over(self) -> bool:
        """Whether the job has ended, one way or another."""
        return self.status in LAST_EVENTS

    @property
    def age(self) -> float:
        """Seconds since it was created."""
        return time.monotonic() - self.context.submitted

    @property
    def seconds_left(self) -> float | None:
        """Until its end, as far as measured step times tell."""
        return None if self.due is None else round(max(0.0, self.due - time.monotonic()), 2)

    def expect(self, seconds: float | None) -> None:
        """Take note of an estimate of the seconds left."""
        self.due = None if seconds is None else time.monotonic() + seconds

    @property
    def image_bytes(self) -> int:
        """What its images take."""
        return sum(len(image.data) for image in self.output.images) if self.output else 0

    def drop_images(self) -> None:
        """Give up the bytes of its images; what is known of them stays."""
        if self.output is not None:
            self.output, self.images_dropped = Output(self.output.body, ()), True

    def as_dict(self, *, inline: bool = False) -> dict[str, Any]:
        """Replicate's object. With `inline` images are base64 if that was asked for, else links."""
        path = f"/jobs/{self.id}"
        return {
            "id": self.id,
            "status": str(self.status),
            "input": self.input,
            "output": self._output(inline and self.inline),
            "data_removed": self.images_dropped,
            "error": self.error,
            "queue_position": self.queue_position,
            "progress": self.progress,
            "seconds_left": self.seconds_left,
            "created_at": self._clock(0.0),
            "started_at": self._clock(self.started),
            "completed_at": self._clock(self.ended),
            "metrics": self._metrics(),
            "webhook": self._webhook(),
            "urls": {"get": path, "cancel": f"{path}/cancel", "stream": f"{path}/events"},
        }

    def _output(self, inline: bool) -> dict[str, Any] | None:
        if self.output is None or not inline or self.images_dropped:
            return self.output.body if self.output else None
        entries = [
            {k: v for k, v in entry.items() if k != "url"} | response.inline(number, image)
            for number, (entry, image) in enumerate(
                zip(self.output.body["images"], self.output.images, strict=True)
            )
        ]
        return {**self.output.body, "images": entries}

    def _clock(self, seconds: float | None) -> str | None:
        """ISO 8601 in UTC."""
        if seconds is None:
            return None
        return (self.created + timedelta(seconds=seconds)).isoformat(timespec="milliseconds")

    def _metrics(self) -> dict[str, float]:
        if self.ended is None:
            return {}
        drawn = {} if self.started is None else {"predict_time": self.ended - self.started}
        times = {**drawn, "total_time": self.ended}
        return {name: round(seconds, 4) for name, seconds in times.items()}

    def _webhook(self) -> dict[str, Any] | None:
        if self.webhook is None:
            return None
        return {
            "url": redacted(self.webhook),
            "events": list(self.webhook_events),
            "deliveries": [asdict(delivery) for delivery in self.deliveries],
        }


def told_input(request: GenerateRequest) -> dict[str, Any]:
    """What was asked, without what can hold a token and without the bytes of images."""
    told: dict[str, Any] = _told(request.model_dump(mode="json", exclude_unset=True))
    return told


def _told(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _told(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_told(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if len(value) > MAX_TEXT:
        return f"({len(value)} characters)"
    return redacted(value) if value.startswith(("https://", "http://")) else value
