"""The operator's filter: asked before a request is queued, and before an image leaves.

KLEIN_FILTER names a function from `Check` to `Refuse`, `Mark` or None. It is called in threads of
its own, may be called in several at once, and never in the GPU's. What it raises, or does not
answer in time, is refused with FilterFailed.
"""

import asyncio
import inspect
import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from importlib import import_module
from queue import PriorityQueue
from typing import TYPE_CHECKING, Any, Literal

from klein.core import (
    EditInputs,
    FilterNote,
    FilterReport,
    GeneratedImage,
    GenerationResult,
    Job,
)
from klein.errors import MAX_NAME, BadSetting, FilterFailed, RefusedByFilter
from klein.settings import Settings

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

THREADS = 4
MAX_REASON = 500
"""Characters of a reason that leave."""
NO_PREVIEWS = "previews are not sent: this server's filter judges finished images"


@dataclass(frozen=True, slots=True)
class Check:
    """What a filter judges: at the stage "request" the prompts and the caller's pictures (RGB), at
    the stage "image" one finished image. The images are copies."""

    stage: Literal["request", "image"]
    request_id: str
    prompt: str
    negative_prompt: str
    images: tuple["Image", ...]


@dataclass(frozen=True, slots=True)
class Refuse:
    """It goes no further; the caller reads `reason`, and `field` names what to change."""

    reason: str
    field: str | None = None


@dataclass(frozen=True, slots=True)
class Mark:
    """It goes on, and the answer has `reason` beside it; a finished image can be replaced by
    `image` of the same size."""

    reason: str
    image: "Image | None" = None


Verdict = Refuse | Mark | None
Question = tuple[int, int, "Future[Verdict]", Check]
"""Rank and number, of which the lowest is asked first; no two are alike."""
RANKS = {"image": 0, "request": 1}
"""What was drawn already does not wait behind what was not."""


class Filter:
    """Asks one function, within bounds."""

    def __init__(self, name: str, function: Callable[[Check], Any], seconds: float) -> None:
        self.name = name
        self._function = function
        self._seconds = seconds
        self._questions: PriorityQueue[Question] = PriorityQueue()
        self._numbers = itertools.count()
        self._started: dict[int, float] = {}
        for _ in range(THREADS):  # daemons: one that hangs does not keep the process
            threading.Thread(target=self._work, name="klein-filter", daemon=True).start()

    @classmethod
    def from_settings(cls, settings: Settings) -> "Filter | None":
        """None if none is set; raises BadSetting for one that cannot be loaded."""
        name = settings.filter
        if name is None:
            return None
        module, _, attribute = name.partition(":")
        try:
            function = getattr(import_module(module), attribute)
        except (Exception, SystemExit) as error:  # a module may raise anything, and scripts exit
            raise BadSetting(
                f"KLEIN_FILTER: {name} cannot be loaded ({type(error).__name__}: {error}); its "
                "module must be on PYTHONPATH",
                field="KLEIN_FILTER",
            ) from error
        if not callable(function):
            raise BadSetting(f"KLEIN_FILTER: {name} is no function", field="KLEIN_FILTER")
        if inspect.iscoroutinefunction(function):
            raise BadSetting(
                f"KLEIN_FILTER: {name} is async; it is called in a thread of its own and may "
                "block: write def",
                field="KLEIN_FILTER",
            )
        return cls(name, function, settings.filter_seconds)

    @property
    def hanging(self) -> int:
        """Threads whose call has taken longer than it may, and goes on."""
        latest = time.monotonic() - self._seconds
        return sum(started < latest for started in list(self._started.values()))

    @property
    def is_stuck(self) -> bool:
        """Whether every thread hangs: until one of them ends, all is refused."""
        return self.hanging == THREADS

    def as_dict(self) -> dict[str, Any]:
        """What /capabilities says of it."""
        return {
            "name": self.name,
            "seconds": self._seconds,
            "previews": False,
            "threads": THREADS,
            "hanging": self.hanging,
        }

    async def check_request(self, job: Job) -> Job:
        """The job with the filter's note; raises RefusedByFilter or FilterFailed."""
        verdict = await self._ask("request", job, _pictures(job.inputs))
        if verdict is None:
            return job
        note = FilterNote(verdict.reason, isinstance(verdict, Refuse))
        if isinstance(verdict, Refuse):
            raise RefusedByFilter(_sentence(note), field=verdict.field)
        return replace(job, notes=(note,), warnings=(*job.warnings, _sentence(note)))

    async def check_images(self, job: Job, result: GenerationResult) -> GenerationResult:
        """The result with the images that the filter lets through, and a warning for each of which
        it said something; raises RefusedByFilter if none is left, and FilterFailed."""
        kept: list[GeneratedImage] = []
        notes: list[FilterNote] = []
        for number, image in enumerate(result.images, 1):
            verdict = await self._ask("image", job, [image.image])
            if verdict is not None:
                refused = isinstance(verdict, Refuse)
                notes.append(FilterNote(verdict.reason, refused, number, image.seed))
            if not isinstance(verdict, Refuse):
                kept.append(_replaced(image, verdict))
        told = tuple(map(_sentence, notes))
        if not kept:
            raise RefusedByFilter("; ".join(told))
        return replace(
            result,
            images=tuple(kept),
            warnings=(*result.warnings, *told),
            filter=FilterReport(self.name, (*job.notes, *notes)),
        )

    async def _ask(
        self, stage: Literal["request", "image"], job: Job, images: "list[Image]"
    ) -> Verdict:
        context, params = job.context, job.params
        check = Check(stage, context.id, params.prompt, params.negative_prompt, tuple(images))
        answer: Future[Verdict] = Future()
        self._questions.put((RANKS[stage], next(self._numbers), answer, check))
        seconds = min(self._seconds, context.deadline - time.monotonic())
        try:
            return await asyncio.wait_for(asyncio.wrap_future(answer), seconds)
        except TimeoutError as error:
            context.check()
            log.error("the filter gave no answer to %s within %g s", context.id, self._seconds)
            raise FilterFailed(
                f"this server's filter gave no answer within {self._seconds:g} s"
            ) from error

    def _work(self) -> None:
        while True:
            _, _, answer, check = self._questions.get()
            self._started[threading.get_ident()] = time.monotonic()
            self._answer(answer, check)
            del self._started[threading.get_ident()]
            del answer, check  # or their images stay until the next question

    def _answer(self, answer: "Future[Verdict]", check: Check) -> None:
        """Unless nobody waits any more."""
        if not answer.set_running_or_notify_cancel():
            return
        try:
            copies = tuple(image.copy() for image in check.images)
            answer.set_result(_valid(self._function(replace(check, images=copies)), check))
        except BaseException as error:  # whatever it raises, the thread and its caller go on
            log.exception("the filter failed for %s", check.request_id)
            why = f"this server's filter failed ({type(error).__name__}): see klein's log"
            answer.set_exception(FilterFailed(why))


def _pictures(inputs: EditInputs) -> list["Image"]:
    """The caller's pictures, each once: the one to start from in full, then the references."""
    if inputs.repaint is not None:
        return [inputs.repaint.original, *(each.image for each in inputs.references[1:])]
    start = [] if inputs.start is None else [inputs.start]
    return [each.image for each in (*start, *inputs.references)]


def _valid(verdict: Any, check: Check) -> Verdict:
    """What a filter returned, its reason cut off and its image in RGB; raises anything for what is
    no verdict."""
    match verdict:
        case None:
            return None
        case Refuse(reason, field):
            return Refuse(_printable(reason, MAX_REASON), field and _printable(field, MAX_NAME))
        case Mark(reason, None):
            return Mark(_printable(reason, MAX_REASON))
        case Mark(reason, image) if image is not None:
            if check.stage == "request" or image.size != check.images[0].size:
                raise ValueError("Mark.image must have the size of the finished image")
            return Mark(_printable(reason, MAX_REASON), image.convert("RGB"))
    raise TypeError(f"{type(verdict).__name__} is neither Refuse, Mark nor None")


def _printable(text: Any, most: int) -> str:
    """A filter's text as it may go into JSON, a terminal and a log: in one line, without control
    characters or halves of surrogate pairs."""
    return "".join(each if each.isprintable() else " " for each in str(text)[:most])


def _replaced(image: GeneratedImage, verdict: Mark | None) -> GeneratedImage:
    if verdict is None or verdict.image is None:
        return image
    return GeneratedImage(image.seed, verdict.image)


def _sentence(note: FilterNote) -> str:
    what = "the request" if note.image is None else f"image {note.image} (seed {note.seed})"
    return f"this server's filter {'refused' if note.refused else 'marked'} {what}: {note.reason}"
