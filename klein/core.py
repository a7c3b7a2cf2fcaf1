"""The nouns: what will happen, what is asked of an engine, and what happened."""

import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from klein.errors import Cancelled, DeadlineExceeded, KleinError, LoraError
from klein.lora.file import LoraFile
from klein.lora.spec import LoraSpec, Scale
from klein.models import sizes
from klein.models.catalog import ModelSpec
from klein.models.schedule import Schedule
from klein.pixels import Repaint

if TYPE_CHECKING:
    from PIL.Image import Image


SEEDS = 2**32
"""Seeds are 0 to 2³² - 1; after the last comes 0."""


@dataclass(frozen=True, slots=True)
class Margins:
    """Pixels that a picture is extended by on each side."""

    left: int = 0
    right: int = 0
    top: int = 0
    bottom: int = 0


@dataclass(frozen=True, slots=True)
class InputInfo:
    """How parameters name a caller's picture: by the sha256 of its bytes and its upright size in
    pixels; with the size it is used at and the tokens it takes, 0 for one that is no reference."""

    sha256: str
    width: int
    height: int
    used_width: int
    used_height: int
    tokens: int


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """What will be drawn: everything decided. Sizes are pixels; image i has seed `seed + i`.

    `width` and `height` are those that are drawn; a repainted picture leaves at its own size. What
    does not apply is None: `strength` without a start image, `mask_feather` without a mask,
    `mask_padding` where the whole picture is drawn, `reference_megapixels` without references.
    `speed` is a tier's name; empty, in what klein draws for itself, it is the pipeline's own.
    """

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
    sampler: str
    schedule: Schedule
    max_sequence_length: int
    images: tuple[InputInfo, ...] = ()
    reference_megapixels: float | None = None
    init_image: InputInfo | None = None
    strength: float | None = None
    mask: InputInfo | None = None
    mask_feather: int | None = None
    mask_padding: int | None = None
    extend: Margins | None = None
    speed: str = ""


@dataclass(frozen=True, slots=True)
class Delivery:
    """How images leave: a name from FORMATS, its quality (1 to 100), a name from RETURN_TYPES."""

    output_format: str
    output_quality: int
    return_type: str


@dataclass(frozen=True, slots=True)
class LoraReport:
    """What one LoRA of a request did: proof that it acted, or why it did not.

    `effective_scale` is scale · alpha / rank (the mean over layers that differ), `relative_change`
    the mean over its layers of |scale · ΔW| / |W| (Frobenius norms); of a scale over the run, both
    are those of the piece that changes most. `merges` counts how often the job's LoRAs were put on
    together, none where they were on already, and `seconds` is what that took. `block_layers` says
    of each pattern of its block weights for how many layers it decided. `merged_into` is what the
    model's weights come in: into "float8" ones a LoRA is merged in float32, and they are rounded to
    float8 again, so it acts nearly as trained.
    """

    path: str
    scale: Scale
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
    merged_into: str | None = None
    block_layers: Mapping[str, int] = field(default_factory=dict)
    merges: int = 0
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class GeneratedImage:
    """One image, RGB, of the size in the parameters, or of the picture that was repainted; then
    `unchanged_pixels` counts those that are the caller's own, bit for bit. `file` is the image as
    it leaves, where another process has written it already."""

    seed: int
    image: "Image"
    unchanged_pixels: int | None = None
    file: bytes | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The model that drew a picture, and on what; `speed` is the tier in force, `speeds` those that
    a request may name, `transformer` the file that its transformer's weights are from, where that
    is not the model's own."""

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
    transformer: str | None = None
    speeds: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The model's name, and its file's, without a comma."""
        file = f" ({self.transformer.replace(',', '_')})" if self.transformer else ""
        return f"{self.spec.name}{file}"


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds by stage: `fetch` from a request's arrival until its LoRAs and pictures are at hand,
    `queue` from there until the device is free, `total` the whole."""

    fetch: float = 0.0
    queue: float = 0.0
    text: float = 0.0
    lora: float = 0.0
    encode: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    total: float = 0.0


@dataclass(frozen=True, slots=True)
class FilterNote:
    """What a filter said of image `image` (from 1), or of the request, where both numbers are
    None. What was `refused` does not leave."""

    reason: str
    refused: bool
    image: int | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class FilterReport:
    """The filter that saw a result, and all that it had to say."""

    name: str
    notes: tuple[FilterNote, ...]


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """What happened. `mu` and `sigmas` are those of the run, `forwards` the transformer's; `mu` is
    None where the request gave its noise levels. `inputs` are the caller's pictures, and `filter`
    is None where there is no filter."""

    id: str
    params: GenerationParams
    images: tuple[GeneratedImage, ...]
    loras: tuple[LoraReport, ...]
    mu: float | None
    sigmas: tuple[float, ...]
    forwards: int
    timings: Timings
    warnings: tuple[str, ...]
    model: ModelInfo
    inputs: "EditInputs | None" = None
    filter: FilterReport | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a request, at its end. `started` is in nanoseconds since 1970; `detail` says
    how much of what was done, such as its steps."""

    name: str
    started: int
    seconds: float
    detail: Mapping[str, int]


def ignore_stage(_: Stage) -> None:
    """Of a request that nobody traces."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Step `step` of `steps` of image `image` of `images`, all counted from 1; while a LoRA or a
    picture is fetched `stage` is "fetch" and the steps are bytes."""

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


def ignore_progress(_: Progress) -> None:
    """Of a request whose caller hears nothing before its end."""


@dataclass(frozen=True, slots=True)
class Preview:
    """What image `image` (from 1) would be after step `step` of `steps`: a small picture by a
    linear map of the latents, or with `decoded` by the VAE from the predicted clean latents."""

    step: int
    steps: int
    image: int
    picture: "Image"
    decoded: bool = False


@dataclass(frozen=True, slots=True)
class PreviewRequest:
    """Which previews a caller wants: a small one every `every` steps (0: none), and `decoded` of
    them by the VAE, spread evenly over the steps. `receive` is called in the pipeline's thread."""

    receive: Callable[[Preview], None]
    every: int = 0
    decoded: int = 0


def new_id() -> str:
    """A request's id: 16 hexadecimal digits."""
    return uuid.uuid4().hex[:16]


@dataclass(frozen=True, slots=True)
class RequestContext:
    """What goes with one request from its arrival to its answer: who it is, how long it may take,
    whether its caller gave it up, and who wants to hear of its progress.

    `deadline` and `submitted` are on the clock of `time.monotonic`; `on_progress` and `on_stage`
    are called in any thread.
    """

    deadline: float
    id: str = field(default_factory=new_id)
    on_progress: Callable[[Progress], None] = ignore_progress
    previews: PreviewRequest | None = None
    on_stage: Callable[[Stage], None] = ignore_stage
    submitted: float = field(default_factory=time.monotonic)
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Ask the work to stop; it does so at its next step, or never starts."""
        self._cancelled.set()

    @property
    def over(self) -> KleinError | None:
        """Why the work must not go on, or None."""
        if self._cancelled.is_set():
            return Cancelled("the job was cancelled")
        if time.monotonic() >= self.deadline:
            return DeadlineExceeded(
                "the job ran out of time: ask for fewer steps or a smaller picture, "
                "or raise KLEIN_TIMEOUT"
            )
        return None

    def check(self) -> None:
        """Raise Cancelled or DeadlineExceeded if the work must stop."""
        if error := self.over:
            raise error

    def report(self, progress: Progress) -> None:
        """Tell the caller about a finished step, then check."""
        self.on_progress(progress)
        self.check()


@dataclass(frozen=True, slots=True)
class InputImage:
    """A caller's picture as a pipeline uses it: RGB, upright, already at the size it is used at,
    both sides multiples of 16. `sha256` is of the bytes as sent, `width` and `height` their
    upright size, and `data` those bytes."""

    image: "Image"
    sha256: str
    width: int
    height: int
    data: bytes = b""

    @property
    def tokens(self) -> int:
        """Tokens it takes as a reference."""
        return sizes.tokens(*self.image.size)


@dataclass(frozen=True, slots=True)
class EditInputs:
    """The caller's pictures that a job needs.

    `references` are context, in the order of their time ids 10, 20, …; a picture that is repainted
    is the first of them. `start` has the size that is drawn, and `params.strength` says from where
    to start with it. `repaint` is there when parts of `start` stay: its `mask` says which.
    """

    references: tuple[InputImage, ...] = ()
    start: InputImage | None = None
    repaint: Repaint | None = None

    @property
    def reference_tokens(self) -> int:
        """Tokens that the references add to each forward."""
        return sum(reference.tokens for reference in self.references)


@dataclass(frozen=True, slots=True)
class Job:
    """What a pipeline is to draw: `params` with everything settled, the files that `params.loras`
    led to (or why one could not be had), what was changed on the way, the pictures sent, and what
    the filter said of the request. `ready` is when all that was known, on the clock of
    `time.monotonic`."""

    context: RequestContext
    params: GenerationParams
    loras: tuple[LoraFile | LoraError, ...] = ()
    warnings: tuple[str, ...] = ()
    inputs: EditInputs = EditInputs()
    notes: tuple[FilterNote, ...] = ()
    ready: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class PipelineStats:
    """A pipeline now: why its tier is no faster one; since the start, GPU kernels compiled, jobs
    that ran out of GPU memory and were tried again, and changes of the LoRAs in the weights; bytes
    of GPU memory (None without a GPU)."""

    speed_why: str = ""
    kernels_compiled: int = 0
    memory_retries: int = 0
    lora_switches: int = 0
    gpu_memory_free: int | None = None
    gpu_memory_total: int | None = None


class ImagePipeline(Protocol):
    """What an engine drives. One job at a time; after an exception the next job finds it clean."""

    info: ModelInfo

    def generate(self, job: Job) -> GenerationResult:
        """Draw the images of `job`; raises a KleinError."""
        ...

    def stats(self) -> PipelineStats:
        """What is worth knowing of the pipeline now; callable from any thread."""
        ...
