"""The real pipeline: encodes, puts LoRAs on, samples and decodes, one job at a time."""

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
from PIL import Image
from torch import Tensor

from klein import __version__
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
from klein.errors import InternalError, InvalidRequest, LoraError, OutOfMemory
from klein.inference.adapters.merge import LoraMerger, Wanted
from klein.inference.denoise import Sampler
from klein.inference.offload import Shuttle
from klein.lora.file import LoraFile
from klein.lora.library import LoraLibrary
from klein.models import schedule, sizes
from klein.models.catalog import GB, PEAKS, SPARING
from klein.models.plan import Plan
from klein.request.resolve import resolve, settle_loras
from klein.request.schema import GenerateRequest
from klein.settings import Settings
from klein.sources.address import redacted

log = logging.getLogger("bentoml.klein")

EMBEDS_KEPT = 16


class KleinPipeline:
    """One model on one device, and the LoRAs on it. One job at a time."""

    def __init__(
        self,
        pipe: Flux2KleinPipeline,
        plan: Plan,
        settings: Settings,
        library: LoraLibrary,
        sampler: Sampler,
        attention: str,
        shuttle: Shuttle | None = None,
    ) -> None:
        self._pipe = pipe
        self._plan = plan
        self._settings = settings
        self._library = library
        self._shuttle = shuttle
        originals = shuttle.originals(pipe.transformer) if shuttle else None
        self._merger = LoraMerger(pipe.transformer, plan.spec, originals)
        self._scheduler = pipe.scheduler
        self._sampler = sampler
        self._embeds: OrderedDict[tuple[str, int], Tensor] = OrderedDict()
        self._frugal = False
        self.info = ModelInfo(
            id=Path(settings.model_id).name if plan.local else settings.model_id,
            revision=plan.revision,
            spec=plan.spec,
            device=torch.cuda.get_device_name() if plan.device == "cuda" else "cpu",
            dtype=str(pipe.transformer.dtype).removeprefix("torch."),
            placement=plan.why,
            attention=attention,
            speed=plan.acceleration.tier.name,
            speed_options=plan.acceleration.options,
            versions={
                "klein": __version__,
                "torch": torch.__version__,
                "diffusers": diffusers.__version__,
                "transformers": transformers.__version__,
            },
        )

    def facts(self) -> dict[str, Any]:
        """Why the tier is no faster one, kernels compiled so far, GPU memory in bytes."""
        facts: dict[str, Any] = {"speed_why": self._plan.acceleration.why, "kernels_compiled": 0}
        if self._plan.device != "cuda":
            return facts
        if self._plan.acceleration.has("fused"):
            from klein.inference.acceleration.kernels import Compilations

            facts["kernels_compiled"] = Compilations.count
        free, total = torch.cuda.mem_get_info()
        return facts | {"gpu_memory_free": free, "gpu_memory_total": total}

    def generate(self, job: Job) -> GenerationResult:
        """Make the job's pictures, one after another, so that each is the same alone.

        Raises a KleinError; whatever it raises, the next job finds the pipeline clean. When GPU
        memory runs out it is tried once more with as little of it as possible; OutOfMemory means
        that this failed too.
        """
        try:
            return self._generate(job)
        except torch.OutOfMemoryError:
            log.warning("GPU memory ran out in job %s: once more, sparingly", job.id)
        why = "GPU memory ran out: drawn again in tiles and one branch of guidance at a time"
        job.warnings = (*job.warnings, why)
        try:
            with self._sparing():
                return self._generate(job)
        except torch.OutOfMemoryError as error:
            params = job.params
            raise OutOfMemory(
                f"{params.width}×{params.height} did not fit into GPU memory, twice: ask for a "
                "smaller picture, or start klein with KLEIN_OFFLOAD=model"
            ) from error

    @contextmanager
    def _sparing(self) -> Iterator[None]:
        """Little GPU memory for one job: nothing kept, small tiles, one branch at a time."""
        self._embeds.clear()
        self._merger.release()
        torch.cuda.empty_cache()
        paired, self._sampler.paired, self._frugal = self._sampler.paired, False, True
        try:
            yield
        finally:
            self._sampler.paired, self._frugal = paired, False

    def _generate(self, job: Job) -> GenerationResult:
        clock = _Clock(job.submitted)
        if job.loras is None:
            self.prepare(job)
        params, warnings = job.params, list(job.warnings)
        self._sampler.forwards = 0
        try:
            job.check()
            self._admit(params)
            with torch.inference_mode():
                embeds = self._encode(params, warnings)
                clock.lap("text")
                if self._shuttle and self._shuttle.bring(self._pipe.transformer):
                    self._merger.forget()
                reports = self._put_loras(job, warnings)
                clock.lap("lora")
                self._choose_tiling(params, warnings)
                images = tuple(self._draw(job, embeds, i, clock) for i in range(params.num_images))
        finally:
            used = self._pipe.scheduler
            self._pipe.scheduler = self._scheduler
            self._sampler.begin(0, None)
        mu, sigmas = self._check_schedule(params, used)
        return GenerationResult(
            id=job.id,
            params=params,
            images=images,
            loras=tuple(reports),
            mu=mu,
            sigmas=sigmas,
            forwards=self._sampler.forwards,
            timings=clock.seconds(),
            warnings=tuple(warnings),
            model=self.info,
        )

    def warm_up(self) -> None:
        """Draw a few steps, so that the first caller waits for nothing but a picture."""
        request = GenerateRequest(prompt="a portrait", num_inference_steps=2, seed=0)
        params = resolve(request, self._plan.spec, lambda: 0).params
        self.generate(Job(params, deadline=math.inf))

    def _admit(self, params: GenerationParams) -> None:
        """Refuse a picture that GPU memory cannot hold, whatever else is given up for it."""
        if self._plan.device != "cuda":
            return
        need = PEAKS[SPARING].of(params.width, params.height)
        have = _free_memory() + self._merger.spare_bytes()
        if self._shuttle:
            have -= self._shuttle.room_for(self._pipe.transformer)
        if need > have:
            raise InvalidRequest(
                f"width: {params.width}×{params.height} needs about {need / GB:.1f} GB of GPU "
                f"memory beside the weights and {have / GB:.1f} GB are free: ask for a smaller "
                "picture",
                field="width",
            )

    def prepare(self, job: Job) -> None:
        """Find and fetch the job's LoRAs, and settle what only their files know."""
        found: list[LoraFile | LoraError] = []
        for spec in job.params.loras:
            try:
                found.append(self._library.find(spec, job.fetching))
            except LoraError as error:
                if job.params.lora_error == "fail":
                    raise
                found.append(error)
        job.loras = tuple(found)
        settled = settle_loras(job.params, job.loras)
        job.params, job.warnings = settled.params, (*job.warnings, *settled.warnings)

    # -- LoRAs ---------------------------------------------------------------------------------

    def _put_loras(self, job: Job, warnings: list[str]) -> list[LoraReport]:
        """Make the job's LoRAs active; with `lora_error: continue` failures become warnings."""
        reports: list[LoraReport | None] = []
        wanted = []
        for spec, found in zip(job.params.loras, job.loras or (), strict=True):
            path, scale = redacted(spec.path), spec.scale or 0.0
            try:
                if isinstance(found, LoraError):
                    raise found
                self._merger.check(found)
                wanted.append(Wanted(path, found, scale))
                reports.append(None)
            except LoraError as error:
                if job.params.lora_error == "fail":
                    raise
                warnings.append(f"DRAWN WITHOUT A LORA: {error}")
                reports.append(LoraReport(path, scale, applied=False, error=str(error)))
        with self._weights_at_hand(self._merger.has(wanted)):
            applied = iter(self._merger.apply(wanted))
        return [report or next(applied) for report in reports]

    @contextmanager
    def _weights_at_hand(self, unchanged: bool) -> Iterator[None]:
        """Sequential offload keeps weights out of reach; take it off while they change."""
        if unchanged or self._plan.offload != "sequential":
            yield
            return
        self._pipe.remove_all_hooks()
        try:
            yield
        finally:
            self._pipe.enable_sequential_cpu_offload()

    # -- text ----------------------------------------------------------------------------------

    def _encode(
        self, params: GenerationParams, warnings: list[str]
    ) -> tuple[Tensor, Tensor | None]:
        """Embeddings (1, max_sequence_length, 3 · hidden) of the prompt and, with CFG, of the
        negative prompt."""
        length = params.max_sequence_length
        for field, text in (("prompt", params.prompt), ("negative_prompt", params.negative_prompt)):
            if cut := self._cut_at(text, length):
                warnings.append(cut.format(field=field))
        positive = self._embed(params.prompt, length)
        guided = params.guidance_scale > 1 and not self._plan.spec.distilled
        return positive, self._embed(params.negative_prompt, length) if guided else None

    def _embed(self, text: str, length: int) -> Tensor:
        key = (text, length)
        if key not in self._embeds:
            if self._shuttle:
                self._shuttle.bring(self._pipe.text_encoder)
            self._embeds[key] = self._pipe.encode_prompt(text, max_sequence_length=length)[0]
            if len(self._embeds) > EMBEDS_KEPT:
                self._embeds.popitem(last=False)
        self._embeds.move_to_end(key)
        return self._embeds[key]

    def _cut_at(self, text: str, length: int) -> str | None:
        """A sentence saying where the encoder stops reading, or None if it reads everything."""
        tokenizer = self._pipe.tokenizer
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        ids = tokenizer(chat)["input_ids"]
        if len(ids) <= length:
            return None
        tail = " ".join(tokenizer.decode(ids[:length]).split()[-6:])
        return f"{{field}} was cut: it has {len(ids)} tokens and {length} are read, up to “…{tail}”"

    # -- sampling ------------------------------------------------------------------------------

    def _draw(
        self, job: Job, embeds: tuple[Tensor, Tensor | None], number: int, clock: "_Clock"
    ) -> GeneratedImage:
        params = job.params
        seed = (params.seed + number) % SEEDS
        steps = params.num_inference_steps
        before = self._sampler.forwards
        self._sampler.begin(steps, embeds[1])
        expected = self._sampler.expected(steps)
        self._set_scheduler(params)

        def on_step(_: Any, step: int, __: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            if step + 1 == steps:
                if self._plan.device == "cuda":
                    torch.cuda.synchronize()
                clock.lap("denoise")
            job.report(Progress(step + 1, steps, number + 1, params.num_images))
            return tensors

        output = self._pipe(
            prompt_embeds=embeds[0],
            negative_prompt_embeds=embeds[1],
            width=params.width,
            height=params.height,
            num_inference_steps=steps,
            guidance_scale=params.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(seed),
            max_sequence_length=params.max_sequence_length,
            output_type="pt",
            callback_on_step_end=on_step,
        )
        picture = _as_picture(output.images[0])
        clock.lap("decode")
        if self._sampler.forwards - before != expected:
            raise InternalError(
                f"{self._sampler.forwards - before} transformer forwards were run instead of "
                f"{expected}"
            )
        return GeneratedImage(seed, picture)

    def _set_scheduler(self, params: GenerationParams) -> None:
        """`bfl` is the pipeline's own; another mu is a scheduler with that shift fixed."""
        if params.schedule == "bfl":
            self._pipe.scheduler = self._scheduler
            return
        image_tokens = sizes.tokens(params.width, params.height)
        mu = schedule.mu_of(params.schedule, image_tokens, params.num_inference_steps)
        self._pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
            {**self._scheduler.config, "use_dynamic_shifting": False, "shift": math.exp(mu)}
        )

    def _check_schedule(
        self, params: GenerationParams, used: Any
    ) -> tuple[float, tuple[float, ...]]:
        """mu and the sigmas the run really had; they must be those the schedule promises."""
        steps = params.num_inference_steps
        mu = schedule.mu_of(params.schedule, sizes.tokens(params.width, params.height), steps)
        ran = tuple(float(sigma) for sigma in used.sigmas[:steps])
        if max(abs(a - b) for a, b in zip(ran, schedule.sigmas(mu, steps), strict=True)) > 1e-4:
            raise InternalError(f"the sampler did not follow the schedule {params.schedule!r}")
        return mu, ran

    def _choose_tiling(self, params: GenerationParams, warnings: list[str]) -> None:
        need = PEAKS[self.info.speed].of(params.width, params.height)
        tiled = self._settings.vae_tiling == "on" or self._frugal
        if self._settings.vae_tiling == "auto" and self._plan.device == "cuda":
            tiled = tiled or _free_memory() < need
        self._pipe.vae.use_tiling = tiled
        if tiled and max(params.width, params.height) > self._pipe.vae.tile_sample_min_size:
            warnings.append("the picture was decoded in tiles to save memory; seams can differ")


class _Clock:
    """Seconds by stage; laps of the same stage add up."""

    def __init__(self, submitted: float) -> None:
        self._started = self._last = time.perf_counter()
        self._laps = {"queue": time.monotonic() - submitted}

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self._laps[stage] = self._laps.get(stage, 0.0) + now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        total = self._laps["queue"] + time.perf_counter() - self._started
        return {stage: round(s, 4) for stage, s in (self._laps | {"total": total}).items()}


def _free_memory() -> int:
    """Bytes of GPU memory that can be had, those that torch holds and does not use included."""
    held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return int(torch.cuda.mem_get_info()[0]) + held


def _as_picture(image: Tensor) -> Image.Image:
    """A picture from (3, height, width), 0 to 1."""
    levels = (image.float() * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().cpu().numpy())
