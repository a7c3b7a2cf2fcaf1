"""The nouns: what will happen, what is asked of an engine, and what happened."""

import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from klein.errors import Cancelled, DeadlineExceeded, KleinError, LoraError
from klein.lora.file import LoraFile
from klein.lora.spec import LoraSpec
from klein.models.catalog import ModelSpec
from klein.models.schedule import Schedule

if TYPE_CHECKING:
    from PIL.Image import Image


SEEDS = 2**32
"""Seeds are 0 to 2³² - 1; after the last comes 0."""


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """What will happen: everything decided. Sizes are pixels; image i has seed `seed + i`."""

    prompt: str
    negative_prompt: str
    preset: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    num_images: int
    loras: tuple[LoraSpec, ...]
    lora_error: Literal["continue", "fail"]
    schedule: Schedule
    max_sequence_length: int
    output_format: str
    output_quality: int
    return_type: str


@dataclass(frozen=True, slots=True)
class LoraReport:
    """What one LoRA of a request did: proof that it acted, or why it did not.

    `effective_scale` is scale · alpha / rank (the mean over layers that differ), `relative_change`
    the mean over its layers of |scale · ΔW| / |W| (Frobenius norms), `seconds` what it took to put
    all LoRAs of the job on.
    """

    path: str
    scale: float
    applied: bool
    error: str | None = None
    sha256: str | None = None
    format: str | None = None
    rank: int | None = None
    layers_matched: int = 0
    layers_in_file: int = 0
    effective_scale: float | None = None
    relative_change: float | None = None
    trigger_words: tuple[str, ...] = ()
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class GeneratedImage:
    """One picture, RGB, of the size in the parameters."""

    seed: int
    image: "Image"


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The model that drew a picture, and on what; `speed` is the tier in force."""

    id: str
    revision: str | None
    spec: ModelSpec
    device: str
    dtype: str
    placement: str
    versions: dict[str, str]
    attention: str = "torch's own attention"
    speed: str = "eager"
    speed_options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """What happened. `mu` and `sigmas` are those of the run; `timings` are seconds by stage."""

    id: str
    params: GenerationParams
    images: tuple[GeneratedImage, ...]
    loras: tuple[LoraReport, ...]
    mu: float
    sigmas: tuple[float, ...]
    forwards: int
    timings: dict[str, float]
    warnings: tuple[str, ...]
    model: ModelInfo


@dataclass(frozen=True, slots=True)
class Progress:
    """Step `step` of `steps` of picture `image` of `images`, all counted from 1; while a LoRA is
    fetched `stage` is "fetch" and the steps are bytes."""

    step: int
    steps: int
    image: int
    images: int
    stage: str = "denoise"

    @property
    def fraction(self) -> float:
        """Of the drawing, or of the fetching; 0 to 1."""
        done = (self.image - 1) * self.steps + self.step
        return min(1.0, done / max(1, self.steps * self.images))


@dataclass(slots=True)
class Job:
    """One request on its way. `deadline` is on the clock of `time.monotonic`."""

    params: GenerationParams
    deadline: float
    warnings: tuple[str, ...] = ()
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:16])
    on_progress: Callable[[Progress], None] = lambda _: None
    submitted: float = field(default_factory=time.monotonic)
    loras: tuple[LoraFile | LoraError, ...] | None = None
    """What `params.loras` turned out to be; set by `ImagePipeline.prepare`."""
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Ask the job to stop; it does so at its next step, or never starts."""
        self._cancelled.set()

    @property
    def over(self) -> KleinError | None:
        """Why the job must not go on, or None."""
        if self._cancelled.is_set():
            return Cancelled("the job was cancelled")
        if time.monotonic() > self.deadline:
            return DeadlineExceeded(
                "the job ran out of time: ask for fewer steps or a smaller picture, "
                "or raise KLEIN_TIMEOUT"
            )
        return None

    def check(self) -> None:
        """Raise Cancelled or DeadlineExceeded if the job must stop."""
        if error := self.over:
            raise error

    def fetching(self, have: int, total: int | None) -> None:
        """Tell the caller about bytes of a LoRA on their way, then check."""
        self.report(Progress(have, total or have, 1, 1, stage="fetch"))

    def report(self, progress: Progress) -> None:
        """Tell the caller about a finished step, then check."""
        self.on_progress(progress)
        self.check()


class ImagePipeline(Protocol):
    """What an engine drives. One job at a time; after an exception the next job finds it clean."""

    info: ModelInfo

    def prepare(self, job: Job) -> None:
        """Do for `job` what needs no GPU, such as fetching LoRAs; in any thread, many at once."""
        ...

    def generate(self, job: Job) -> GenerationResult: ...

    def facts(self) -> dict[str, Any]:
        """What is worth knowing of the pipeline now, such as memory in use."""
        ...
