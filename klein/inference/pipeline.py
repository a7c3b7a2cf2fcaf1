"""The real pipeline: text, LoRAs, denoising, decoding; one job at a time."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image
from torch import Tensor

from klein import __version__, logs
from klein.core import (
    SEEDS,
    EditInputs,
    GeneratedImage,
    GenerationParams,
    GenerationResult,
    Job,
    LoraReport,
    ModelInfo,
    PipelineStats,
    Progress,
    RequestContext,
    Stage,
    Timings,
)
from klein.errors import LoraError
from klein.inference import latents, memory, offload
from klein.inference.adapters.merge import AdapterRequest, LoraMerger
from klein.inference.adapters.over_run import JobLoras
from klein.inference.denoise import (
    Embeddings,
    Forward,
    NotFinite,
    Run,
    Step,
    Tokens,
    denoise,
    noise_levels,
)
from klein.inference.inpaint import Keep, Start, token_mask
from klein.inference.offload import ModelOffloader
from klein.inference.preview import LinearMap, Previews
from klein.inference.references import ImageEncoder
from klein.inference.text import PromptEncoder
from klein.models import sizes
from klein.models.plan import Plan
from klein.models.samplers import DEFAULT_SAMPLER, SAMPLERS, Sampler
from klein.models.schedule import first_step, mu_of
from klein.models.speed import STEP_SKIPPING, Acceleration
from klein.settings import Settings

log = logging.getLogger(__name__)

LOW_MEMORY_WARNING = "GPU memory ran out: drawn again in tiles and one branch of guidance at a time"
TILES_WARNING = "the picture was decoded in tiles to save memory; seams can differ"


@dataclass(frozen=True, slots=True)
class Parts:
    """diffusers' and transformers' modules, and what runs two of them: their own forward or a
    faster one over the same weights."""

    transformer: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    denoiser: Forward
    encoder: Callable[..., Any]


class KleinPipeline:
    """One model on one device, and the LoRAs on it. One job at a time."""

    def __init__(
        self,
        parts: Parts,
        plan: Plan,
        settings: Settings,
        attention: str,
        offloader: ModelOffloader | None = None,
        parts_for: Callable[[Acceleration], Parts] | None = None,
    ) -> None:
        """`parts` are where `plan` wants them; `offloader` moves them where that is its way, and
        `parts_for` gives them as they run in a tier that a request names."""
        self.parts = parts
        self.info = _info(parts, plan, settings, attention)
        self._plan = plan
        self._tiers = plan.tiers
        self._parts_for = parts_for or (lambda _: parts)
        self.prompts = self._plain_prompts = self._prompts_by(parts.encoder, offloader)
        if parts.encoder is not parts.text_encoder:
            self._plain_prompts = self._prompts_by(parts.text_encoder, offloader)
        self._settings = settings
        self._offloader = offloader
        self._encoder = ImageEncoder(parts.vae)
        self._map: LinearMap | None = None
        originals = offloader.originals(parts.transformer) if offloader else None
        self._merger = LoraMerger(parts.transformer, plan.spec, originals)
        self._memory_retries = 0

    def _prompts_by(
        self, encoder: Callable[..., Any], offloader: ModelOffloader | None
    ) -> PromptEncoder:
        text_encoder = self.parts.text_encoder
        return PromptEncoder(
            encoder,
            self.parts.tokenizer,
            self._plan.device,
            before=lambda: offloader and offloader.activate(text_encoder),
        )

    def stats(self) -> PipelineStats:
        """Why the tier is no faster one, counts since the start, GPU memory."""
        now = PipelineStats(
            self._plan.acceleration.why,
            memory_retries=self._memory_retries,
            lora_switches=self._merger.switches,
        )
        if not self._plan.on_gpu:
            return now
        if self._plan.acceleration.has("fused"):
            from klein.inference.acceleration.kernels import Compilations

            now = replace(now, kernels_compiled=Compilations.count)
        free, total = torch.cuda.mem_get_info()
        return replace(now, gpu_memory_free=free, gpu_memory_total=total)

    def warm_up(self) -> None:
        """Draw a few steps, so that the first caller waits for nothing but an image."""
        spec = self._plan.spec
        params = GenerationParams(
            prompt="a portrait",
            negative_prompt="",
            preset="",
            width=spec.native_size,
            height=spec.native_size,
            num_inference_steps=2,
            guidance_scale=1.0 if spec.distilled else 2.5,
            seed=0,
            num_images=1,
            loras=(),
            lora_error="fail",
            sampler=DEFAULT_SAMPLER,
            schedule="bfl",
            max_sequence_length=spec.max_sequence_length,
        )
        self.generate(Job(RequestContext(deadline=math.inf), params))

    def generate(self, job: Job) -> GenerationResult:
        """Draw the job's images one after another, so that each is the same alone.

        Raises a KleinError; whatever it raises, the next job finds the pipeline clean. When GPU
        memory runs out it is tried once more with as little of it as possible; OutOfMemory means
        that this failed too.
        """
        # Retried and raised outside the handlers: a traceback would keep the tensors of its frames.
        with _Clock(job) as clock:
            for low_memory in (False, True):
                try:
                    return self._generate(job, clock, low_memory)
                except torch.OutOfMemoryError:
                    log.warning("GPU memory ran out in job %s", job.context.id)
                self._memory_retries += not low_memory
                self._release()
        raise memory.out_of_memory(job.params)

    def _release(self) -> None:
        """Give back the GPU memory that only makes the next job quicker."""
        self.prompts.forget()
        self._plain_prompts.forget()
        self._encoder.forget()
        self._merger.release()
        torch.cuda.empty_cache()

    def _generate(self, job: Job, clock: "_Clock", low_memory: bool) -> GenerationResult:
        params, warnings = job.params, list(job.warnings)
        job.context.check()
        faster = self._acceleration(params.speed)
        parts = self._parts_for(faster)
        if low_memory:
            warnings.append(LOW_MEMORY_WARNING)
        elif self._plan.on_gpu:
            memory.require_room(params, job.inputs.reference_tokens, self._available())
        with torch.inference_mode():
            clock.enter("text")
            text = self._encode(params, parts, warnings)
            clock.enter("lora", loras=len(params.loras))
            if self._offloader and self._offloader.activate(self.parts.transformer):
                self._merger.forget()
            self._merger.use(float8=faster.has("float8"))
            mu, levels = _levels(params)
            loras = JobLoras(job, len(levels) - 1, partial(self._merge, job, low_memory))
            loras.merge(0)
            clock.enter("encode", references=len(job.inputs.references))
            run = _run(params, levels, loras.changes, faster, low_memory, warnings)
            self.parts.vae.use_tiling = low_memory
            references = self._encoder.references(job.inputs.references)
            self._choose_tiling(params, faster, low_memory, warnings)
            drawing = _Drawing(job, run, text, references, loras, parts.denoiser)
            with _blaming(loras):
                images = tuple(self._draw(drawing, i, clock) for i in range(params.num_images))
            clock.leave()
        warnings += loras.warnings()
        return GenerationResult(
            id=job.context.id,
            params=params,
            images=images,
            loras=tuple(loras.reports),
            mu=mu,
            sigmas=run.sigmas[:-1],
            forwards=run.computed * len(text.branches) * params.num_images,
            timings=clock.timings(),
            warnings=tuple(warnings),
            model=replace(self.info, speed=faster.tier.name, speed_options=faster.options),
        )

    def _acceleration(self, speed: str) -> Acceleration:
        """That of a tier's name, which is the pipeline's own or one that it offers."""
        own = self._plan.acceleration
        return own if speed in ("", own.tier.name) else self._tiers[speed]

    def _available(self) -> int:
        """Bytes of GPU memory that a job can have beside the weights."""
        available = memory.free_bytes() + self._merger.spare_bytes()
        if self._offloader:
            available -= self._offloader.room_for(self.parts.transformer)
        return available

    def _encode(self, params: GenerationParams, parts: Parts, warnings: list[str]) -> Embeddings:
        """The prompt's embeddings and, with guidance, the negative prompt's."""
        length = params.max_sequence_length
        own = parts.encoder is self.parts.encoder
        encode = (self.prompts if own else self._plain_prompts).encode
        for field, text in (("prompt", params.prompt), ("negative_prompt", params.negative_prompt)):
            if cut := self.prompts.cut(text, length):
                warnings.append(f"{field} {cut}")
        guided = params.guidance_scale > 1 and not self._plan.spec.distilled
        return Embeddings(
            encode(params.prompt, length),
            encode(params.negative_prompt, length) if guided else None,
        )

    # -- LoRAs ---------------------------------------------------------------------------------

    def _merge(
        self, job: Job, low_memory: bool, requests: Sequence[AdapterRequest]
    ) -> list[LoraReport]:
        """Make LoRAs of the job active; raises with `lora_error: fail`."""
        with self._weights_in_reach(self._merger.has(requests)):
            reports = self._merger.apply(requests, last_try=low_memory)
        if self._merger.errors and job.params.lora_error == "fail":
            raise self._merger.errors[0]
        return reports

    @contextmanager
    def _weights_in_reach(self, unchanged: bool) -> Iterator[None]:
        """Sequential offload keeps weights out of reach; take it off while they change."""
        if unchanged or self._plan.offload != "sequential":
            yield
            return
        offload.bring_back(self.parts.transformer)
        try:
            yield
        finally:
            offload.sequentially(self._plan.device, self.parts.transformer)

    # -- sampling ------------------------------------------------------------------------------

    def _draw(self, drawing: "_Drawing", number: int, clock: "_Clock") -> GeneratedImage:
        job, run, loras = drawing.job, drawing.run, drawing.loras

        def change(step: int) -> None:
            clock.enter("lora", image=number + 1, step=step)
            loras.merge(step)
            clock.enter("denoise", image=number + 1, steps=run.steps)

        if loras.changes and number:
            change(0)
        clock.enter("denoise", image=number + 1, steps=run.steps)
        seed = (job.params.seed + number) % SEEDS
        size = job.params.width, job.params.height
        prompt = drawing.text.prompt
        noises = latents.noises(*size, seed, prompt.dtype, prompt.device)
        image = next(noises)
        image, keep = self._started(job.inputs, run, image)
        previews = self._previews(job, run, number + 1)

        def on_step(step: Step) -> None:
            if previews:
                previews(step)
            job.context.report(Progress(step.number, run.steps, number + 1, job.params.num_images))

        clean = denoise(
            drawing.denoiser,
            run,
            drawing.text,
            image,
            on_step,
            drawing.references,
            keep,
            lambda: next(noises).latents,
            change,
        )
        if previews:
            previews.flush()
        clock.enter("decode", image=number + 1)
        drawn = latents.decode(self.parts.vae, clean, *size)
        unchanged = None
        if job.inputs.repaint:
            drawn, unchanged = job.inputs.repaint.put_back(drawn)
        return GeneratedImage(seed, drawn, unchanged)

    def _started(self, inputs: EditInputs, run: Run, noise: Tokens) -> tuple[Tokens, Keep | None]:
        """Where the run begins, and what it keeps, with the noise of its seed."""
        if inputs.start is None:
            return noise, None
        encoded = latents.tokens(self._encoder.encode(inputs.start.image))
        start = Start(encoded.latents, noise.latents)
        image = Tokens(start.at(run.sigmas[0]), noise.ids)
        if inputs.repaint is None:
            return image, None
        return image, Keep(start, token_mask(inputs.repaint.mask, image))

    def _previews(self, job: Job, run: Run, number: int) -> Previews | None:
        if job.context.previews is None:
            return None
        size, repaint = (job.params.width, job.params.height), job.inputs.repaint

        def decode(clean: Tensor) -> Image.Image:
            drawn = latents.decode(self.parts.vae, clean.to(self.parts.vae.dtype), *size)
            return repaint.put_back(drawn)[0] if repaint else drawn

        return Previews(job.context.previews, run.steps, number, size, self._linear_map, decode)

    def _linear_map(self) -> LinearMap:
        """Fitted when it is first wanted; the VAE never changes."""
        if self._map is None:
            self._map = LinearMap.fit(self.parts.vae)
        return self._map

    def _choose_tiling(
        self, params: GenerationParams, faster: Acceleration, low_memory: bool, warnings: list[str]
    ) -> None:
        vae = self.parts.vae
        vae.use_tiling = low_memory or memory.wants_tiles(
            params, self._settings, faster.tier.name, on_gpu=self._plan.on_gpu
        )
        if vae.use_tiling and max(params.width, params.height) > vae.tile_sample_min_size:
            warnings.append(TILES_WARNING)


@dataclass(frozen=True, slots=True)
class _Drawing:
    """What all images of a job share."""

    job: Job
    run: Run
    text: Embeddings
    references: Tokens | None
    loras: JobLoras
    denoiser: Forward


@contextmanager
def _blaming(loras: JobLoras) -> Iterator[None]:
    """With LoRAs on the weights, steps that are not finite are theirs: raises LoraError."""
    try:
        yield
    except NotFinite as error:
        named = ", ".join(repr(one.path) for one in loras.reports if one.applied)
        if not named:
            raise
        raise LoraError(f"LoRA {named}: with it {error}") from error


def _levels(params: GenerationParams) -> tuple[float | None, tuple[float, ...]]:
    """mu, None where the noise levels are given, and the levels that are run through, with the 0
    after them."""
    steps = params.num_inference_steps
    start = first_step(steps, params.strength)
    if isinstance(params.schedule, tuple):
        return None, (*params.schedule, 0.0)[start:]
    mu = mu_of(params.schedule, sizes.tokens(params.width, params.height), steps)
    return mu, noise_levels(params.schedule, mu, steps)[start:]


def _run(
    params: GenerationParams,
    levels: tuple[float, ...],
    changes: tuple[int, ...],
    faster: Acceleration,
    low_memory: bool,
    warnings: list[str],
) -> Run:
    sampler = SAMPLERS[params.sampler]
    skipping = STEP_SKIPPING if faster.has("step_skipping") else None
    if skipping and (why := _skips_none(sampler, len(levels) - 1)):
        warnings.append(f"no step was skipped: {why}")
        skipping = None
    return Run(
        levels,
        sampler,
        params.guidance_scale,
        batched_cfg=faster.has("batched_cfg") and not low_memory,
        skipping=skipping,
        changes=changes,
    )


def _skips_none(sampler: Sampler, steps: int) -> str | None:
    """Why a run skips no step, in words that follow a colon; None where it does."""
    if sampler.skips_from is None:
        return f"{sampler.name} draws new noise in each"
    if steps >= sampler.skips_from:
        return None
    return (
        f"{steps} steps of {sampler.name} are too few, steps are skipped from "
        f"{sampler.skips_from} on"
    )


def _info(parts: Parts, plan: Plan, settings: Settings, attention: str) -> ModelInfo:
    return ModelInfo(
        id=Path(settings.model_id).name if plan.local else settings.model_id,
        revision=plan.revision,
        spec=plan.spec,
        device=plan.target.name,
        dtype=str(parts.transformer.dtype).removeprefix("torch."),
        placement=plan.why,
        attention=attention,
        speed=plan.acceleration.tier.name,
        speed_options=plan.acceleration.options,
        speeds=tuple(plan.tiers),
        transformer=plan.checkpoint.name if plan.checkpoint else None,
        versions={
            "klein": __version__,
            "torch": str(torch.__version__),  # else a class of torch's, which to unpickle loads it
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
    )


class _Clock:
    """Seconds of a job by stage, added up where a stage comes more than once. Each is told to the
    job's listener at its end, and named in what is logged until then."""

    def __init__(self, job: Job) -> None:
        self._context = job.context
        self._seconds: dict[str, float] = {}
        self._stage, self._detail, self._entered = "fetch", dict[str, int](), job.context.submitted
        self.enter("queue", at=job.ready)
        self.leave()

    def __enter__(self) -> "_Clock":
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def enter(self, stage: str, at: float | None = None, **detail: int) -> None:
        """End the stage that is under way and begin another, now or `at` (time.monotonic)."""
        now = time.monotonic() if at is None else at
        self.leave(now)
        logs.set_stage(stage)
        self._stage, self._detail, self._entered = stage, detail, now

    def leave(self, at: float | None = None) -> None:
        """End the stage that is under way, if one is."""
        now, stage = time.monotonic() if at is None else at, self._stage
        if not stage:
            return
        seconds, self._stage = now - self._entered, ""
        self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds
        started = time.time_ns() - round((time.monotonic() - self._entered) * 1e9)
        self._context.on_stage(Stage(stage, started, seconds, self._detail))

    def timings(self) -> Timings:
        total = time.monotonic() - self._context.submitted
        return Timings(**{k: round(s, 6) for k, s in (self._seconds | {"total": total}).items()})
