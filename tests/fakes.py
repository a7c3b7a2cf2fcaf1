"""A pipeline without a model, for tests of everything around it."""

import threading
import time
from collections.abc import Callable
from typing import Any

from PIL import Image

from klein.core import (
    SEEDS,
    GeneratedImage,
    GenerationParams,
    GenerationResult,
    Job,
    LoraReport,
    ModelInfo,
    Progress,
)
from klein.errors import OutOfMemory
from klein.lora.spec import LoraSpec
from klein.models import schedule, sizes
from klein.models.catalog import MODELS
from klein.request.resolve import resolve
from klein.request.schema import GenerateRequest, parse

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
        self.prepared: list[str] = []
        self.fetched = threading.Event()
        self.fetched.set()
        self.fail: Exception | None = None
        self.noise = noise

    def facts(self) -> dict[str, Any]:
        return {}

    def prepare(self, job: Job) -> None:
        self.prepared.append(job.params.prompt)
        while not self.fetched.wait(0.01):
            job.check()

    def generate(self, job: Job) -> GenerationResult:
        params = job.params
        self.started.set()
        if self.fail:
            raise self.fail
        for image in range(params.num_images):
            for step in range(params.num_inference_steps):
                while not self.gate.wait(0.01):
                    job.check()
                job.report(
                    Progress(step + 1, params.num_inference_steps, image + 1, params.num_images)
                )
        self.drawn.append(params.prompt)
        return result(params, job.id, job.warnings, noise=self.noise)


class HungryPipeline(FakePipeline):
    """Runs out of memory when asked for "too much", after a second in which others come to wait."""

    def generate(self, job: Job) -> GenerationResult:
        if job.params.prompt == "too much":
            time.sleep(1)
            raise OutOfMemory("it did not fit into GPU memory: ask for a smaller picture")
        return super().generate(job)


def result(
    params: GenerationParams, id: str = "r1", warnings: tuple[str, ...] = (), *, noise: bool = False
) -> GenerationResult:
    """What the fake makes of `params`: LoRAs called `missing…` are not applied."""
    steps = params.num_inference_steps
    mu = schedule.mu_of(params.schedule, sizes.tokens(params.width, params.height), steps)
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
        sigmas=tuple(schedule.sigmas(mu, steps)),
        forwards=2 * steps * params.num_images,
        timings={"total": 0.5},
        warnings=(*warnings, *missing),
        model=INFO,
    )


def _report(spec: LoraSpec) -> LoraReport:
    if spec.path.startswith("missing"):
        return LoraReport(spec.path, spec.scale, applied=False, error="not there")
    return LoraReport(spec.path, spec.scale, True, None, "ab" * 32, "ai-toolkit", 8, 4, 4, 1.0, 0.1)


def picture(params: GenerationParams, seed: int, noise: bool) -> Image.Image:
    size = (params.width, params.height)
    if noise:
        return Image.effect_noise(size, 100).convert("RGB")
    return Image.new("RGB", size, (seed % 256, seed * 7 % 256, seed * 31 % 256))


def request(**values: Any) -> GenerateRequest:
    return parse({"prompt": "a portrait", **values})


def params(**values: Any) -> GenerationParams:
    return resolve(request(**values), MODELS["nano"], lambda: 7).params


def job(
    seconds: float = 30, on_progress: Callable[[Progress], None] = lambda _: None, **values: Any
) -> Job:
    return Job(params(**values), time.monotonic() + seconds, on_progress=on_progress)
