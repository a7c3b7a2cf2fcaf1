"""A pipeline without a model and LoRAs without files, for tests of everything around them."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from klein.app.generator import Generator
from klein.core import (
    SEEDS,
    Delivery,
    GeneratedImage,
    GenerationParams,
    GenerationResult,
    Job,
    LoraReport,
    ModelInfo,
    PipelineStats,
    Preview,
    Progress,
    RequestContext,
    Timings,
)
from klein.engine.engine import Engine
from klein.errors import LoraError, OutOfMemory
from klein.lora.file import Identity, LoraFile
from klein.lora.library import LoraLibrary
from klein.lora.spec import LoraSpec
from klein.models import schedule, sizes
from klein.models.catalog import MODELS
from klein.request.resolve import Resolved, resolve
from klein.request.schema import GenerateRequest, parse
from klein.settings import Settings
from klein.sources.transport import OnBytes

INFO = ModelInfo(
    id="nano",
    revision=None,
    spec=MODELS["nano"],
    device="fake",
    dtype="float32",
    placement="nowhere",
    versions={"klein": "test"},
)


class FakePipeline:
    """Draws one colour per seed; `gate` holds every step until it is set."""

    def __init__(self, noise: bool = False) -> None:
        self.info = INFO
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Event()
        self.drawn: list[str] = []
        self.fail: Exception | None = None
        self.noise = noise

    def stats(self) -> PipelineStats:
        return PipelineStats()

    def generate(self, job: Job) -> GenerationResult:
        params = job.params
        self.started.set()
        if self.fail:
            raise self.fail
        for image in range(params.num_images):
            for step in range(params.num_inference_steps):
                while not self.gate.wait(0.01):
                    job.context.check()
                job.context.report(
                    Progress(step + 1, params.num_inference_steps, image + 1, params.num_images)
                )
                _preview(job, step + 1, image + 1)
        self.drawn.append(params.prompt)
        drawn = result(params, job.context.id, job.warnings, noise=self.noise)
        return replace(drawn, images=tuple(_put_back(each, job) for each in drawn.images))


def _put_back(drawn: GeneratedImage, job: Job) -> GeneratedImage:
    if job.inputs.repaint is None:
        return drawn
    return GeneratedImage(drawn.seed, *job.inputs.repaint.put_back(drawn.image))


def _preview(job: Job, step: int, image: int) -> None:
    """What the context asked to see after a step: every so many, and decoded ones spread evenly."""
    wanted, steps = job.context.previews, job.params.num_inference_steps
    if wanted is None:
        return
    if wanted.every and step % wanted.every == 0:
        wanted.receive(Preview(step, steps, image, Image.new("RGB", (32, 32), (step, 0, 0))))
    if wanted.decoded and step in {
        steps * n // (wanted.decoded + 1) for n in range(1, wanted.decoded + 1)
    }:
        picture = Image.new("RGB", (job.params.width, job.params.height), (step, 0, 0))
        wanted.receive(Preview(step, steps, image, picture, decoded=True))


class HungryPipeline(FakePipeline):
    """Runs out of memory when asked for "too much", after a second in which others come to wait."""

    def generate(self, job: Job) -> GenerationResult:
        if job.params.prompt == "too much":
            time.sleep(1)
            raise OutOfMemory("it did not fit into GPU memory: ask for a smaller picture")
        return super().generate(job)


class FakeLibrary(LoraLibrary):
    """Has every LoRA but those called `missing…`; `fetched` holds every fetch until it is set."""

    def __init__(self) -> None:
        super().__init__(None)
        self.asked: list[str] = []
        self.fetched = threading.Event()
        self.fetched.set()

    def find(self, spec: LoraSpec, on_bytes: OnBytes = lambda *_: None, **_: Any) -> LoraFile:
        self.asked.append(spec.path)
        while not self.fetched.wait(0.01):
            on_bytes(0, None)
        if spec.path.startswith("missing"):
            raise LoraError(f"LoRA {spec.path!r} is not there")
        nowhere = Identity(0, 0, 0, 0, 0)
        return LoraFile(
            Path(spec.path), spec.path, "ab" * 32, "ai-toolkit", 192, (), (), {}, nowhere
        )


def generator(
    pipeline: FakePipeline, library: LoraLibrary | None = None, /, **settings: str
) -> Generator:
    """A generator on a fake pipeline, loaded."""
    chosen = Settings.from_env(settings)
    engine = Engine(lambda: pipeline, queue_size=chosen.queue_size).start()
    engine.wait_ready(5)
    return Generator(engine, library or FakeLibrary(), chosen, None)


def result(
    params: GenerationParams, id: str = "r1", warnings: tuple[str, ...] = (), *, noise: bool = False
) -> GenerationResult:
    """What the fake makes of `params`: LoRAs called `missing…` are not applied."""
    steps = params.num_inference_steps
    mu, sigmas = _levels(params)
    reports = tuple(_report(spec) for spec in params.loras)
    missing = tuple(f"DRAWN WITHOUT A LORA: {r.path}" for r in reports if not r.applied)
    return GenerationResult(
        id=id,
        params=params,
        images=tuple(
            GeneratedImage((params.seed + i) % SEEDS, picture(params, params.seed + i, noise))
            for i in range(params.num_images)
        ),
        loras=reports,
        mu=mu,
        sigmas=sigmas,
        forwards=2 * steps * params.num_images,
        timings=Timings(total=0.5),
        warnings=(*warnings, *missing),
        model=replace(INFO, speed=params.speed or INFO.speed),
    )


def _levels(params: GenerationParams) -> tuple[float | None, tuple[float, ...]]:
    if isinstance(params.schedule, tuple):
        return None, params.schedule
    steps = params.num_inference_steps
    mu = schedule.mu_of(params.schedule, sizes.tokens(params.width, params.height), steps)
    return mu, tuple(schedule.sigmas(mu, steps))


def _report(spec: LoraSpec) -> LoraReport:
    if spec.path.startswith("missing"):
        return LoraReport(spec.path, spec.scale or 0.0, applied=False, error="not there")
    return LoraReport(
        spec.path, spec.scale or 0.0, True, None, "ab" * 32, "ai-toolkit", 8, 4, 4, 1.0, 0.1
    )


def picture(params: GenerationParams, seed: int, noise: bool) -> Image.Image:
    size = (params.width, params.height)
    if noise:
        return Image.effect_noise(size, 100).convert("RGB")
    return Image.new("RGB", size, (seed % 256, seed * 7 % 256, seed * 31 % 256))


def request(**values: Any) -> GenerateRequest:
    return parse({"prompt": "a portrait", **values})


def resolved(**values: Any) -> Resolved:
    return resolve(request(**values), MODELS["nano"], lambda: 7, speed=INFO.speed)


def params(**values: Any) -> GenerationParams:
    return resolved(**values).params


def delivery(**values: Any) -> Delivery:
    return resolved(**values).delivery


def context(
    seconds: float = 30, on_progress: Callable[[Progress], None] = lambda _: None
) -> RequestContext:
    return RequestContext(time.monotonic() + seconds, on_progress=on_progress)


def job(
    seconds: float = 30, on_progress: Callable[[Progress], None] = lambda _: None, **values: Any
) -> Job:
    return Job(context(seconds, on_progress), params(**values))
