"""The real pipeline: loads FLUX.2-klein as planned, places and accelerates it, samples, decodes."""

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from PIL import Image
from torch import Tensor

from klein import __version__, attention, decoder, loading, preflight, schedule, sizes
from klein.acceleration import THRIFT, Acceleration, eager
from klein.adapters import LoraMerger, Wanted
from klein.attention import Backend
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
from klein.encoder import GraphedEncoder
from klein.errors import InternalError, InvalidRequest, LoraError, ModelUnavailable, OutOfMemory
from klein.lora.file import LoraFile
from klein.lora.library import LoraLibrary
from klein.lora.reference import shown
from klein.models import GB, PEAKS, SPARING
from klein.offload import Shuttle, pin
from klein.preflight import Plan
from klein.request import GenerateRequest
from klein.resolve import resolve, settle_loras
from klein.sampling import Sampler
from klein.settings import Settings
from klein.transformer import FusedForward, quantise

log = logging.getLogger("bentoml.klein")

EMBEDS_KEPT = 16
TILE = 512
"""Side in pixels of a tile at most, where a picture is decoded in tiles."""


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
        """What the tier falls short of; GPU memory in bytes and kernels compiled, with a GPU."""
        facts: dict[str, Any] = {"speed_why": self._plan.acceleration.why}
        if self._plan.device != "cuda":
            return facts
        free, total = torch.cuda.mem_get_info()
        facts |= {"gpu_memory_free": free, "gpu_memory_total": total}
        if self._plan.acceleration.has("fused"):
            from klein.kernels import Compilations

            facts["kernels_compiled"] = Compilations.count
        return facts

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
            path, scale = shown(spec.path), spec.scale or 0.0
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


def load(
    plan: Plan,
    settings: Settings,
    library: LoraLibrary,
    begun: dict[str, loading.Weights] | None = None,
) -> KleinPipeline:
    """Read the weights and place them; raises ModelUnavailable.

    `begun` is what klein.loading has begun to read for this plan already.
    """
    if plan.device == "cuda" and not torch.cuda.is_available():
        raise ModelUnavailable(
            f"torch {torch.__version__} cannot use this GPU: install a CUDA build that fits the "
            "driver, or use MODEL_ID=nano with KLEIN_DEVICE=cpu"
        )
    started = time.perf_counter()
    plan = preflight.fetched(plan, settings)
    begun = begun or loading.begin(plan)
    log.info("reading the weights from %s: %s", plan.found_in, plan.source)
    _quiet()
    capability = torch.cuda.get_device_capability() if plan.device == "cuda" else (0, 0)
    fused = plan.acceleration.has("fused")
    backend = attention.choose(settings.attention, plan.device, capability, fused=fused)
    plan = replace(plan, acceleration=_proved(plan, settings, backend))
    proved = time.perf_counter()
    pipe = _read(plan, settings, begun)
    _assert_klein(pipe, plan)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.use_slicing = settings.vae_slicing
    tile = min(TILE, pipe.vae.config.sample_size)
    pipe.vae.tile_sample_min_size = tile
    pipe.vae.tile_latent_min_size = tile // pipe.vae_scale_factor
    sampler = _accelerate(pipe, plan, backend)
    shuttle = _place(pipe, plan)
    made = KleinPipeline(pipe, plan, settings, library, sampler, backend.label, shuttle)
    read = time.perf_counter()
    if plan.device == "cuda" and plan.offload == "none":
        made.warm_up()
    log.info(
        "%s loaded: kernels ready after %.1f s, weights after %.1f s, warm after %.1f s; %s; "
        "%s tier, %s",
        settings.model_id,
        proved - started,
        read - started,
        time.perf_counter() - started,
        plan.why,
        plan.acceleration.tier.name,
        backend.label,
    )
    return made


def _read(plan: Plan, settings: Settings, begun: dict[str, loading.Weights]) -> Any:
    """The pipeline with its weights where they are used first; raises ModelUnavailable."""
    folder, dtype = Path(plan.source), loading.dtype_on(plan.device)
    try:
        return Flux2KleinPipeline.from_pretrained(
            plan.source,
            text_encoder=loading.text_encoder(
                folder / "text_encoder",
                _cut_config(folder),
                plan.read_to,
                dtype,
                begun["text_encoder"],
            ),
            vae=loading.vae(folder / "vae", plan.read_to, dtype, begun["vae"]),
            transformer=loading.transformer(
                folder / "transformer", plan.transformer_to, dtype, begun["transformer"]
            ),
            local_files_only=True,
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelUnavailable(
            f"{settings.model_id} from {plan.found_in} could not be loaded "
            f"({type(error).__name__}): {str(error)[:300]}"
        ) from error


def _free_memory() -> int:
    """Bytes of GPU memory that can be had, those that torch holds and does not use included."""
    held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return int(torch.cuda.mem_get_info()[0]) + held


def _quiet() -> None:
    """No report on layers that are left out on purpose, and no bars: klein reads the weights."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()


def _cut_config(folder: Path) -> Any:
    """The text encoder's configuration without the layers after the last state that is read."""
    config = transformers.AutoConfig.from_pretrained(folder, subfolder="text_encoder")
    config.num_hidden_layers = min(config.num_hidden_layers, loading.OUT_LAYERS[-1])
    if layer_types := getattr(config, "layer_types", None):
        config.layer_types = layer_types[: config.num_hidden_layers]
    return config


def _assert_klein(pipe: Any, plan: Plan) -> None:
    """What later code relies on, said before the first picture and not after."""
    if not pipe.scheduler.config.use_dynamic_shifting:
        raise ModelUnavailable("this model's scheduler does not shift dynamically: not FLUX.2")
    if bool(pipe.config.is_distilled) != plan.spec.distilled:
        kind = "distilled" if pipe.config.is_distilled else "not distilled"
        raise ModelUnavailable(
            f"model_index.json says {kind}, and {plan.spec.name} is the opposite"
        )


def _proved(plan: Plan, settings: Settings, backend: Backend) -> Acceleration:
    """The acceleration, after klein's forward equalled diffusers' on this GPU.

    The model is one double and one single block of this width with random weights, so the kernels
    that are compiled for it are those of the pictures to come. Where they are wrong or do not
    compile, a tier of klein's own choice becomes eager; one that is named raises ModelUnavailable.
    """
    chosen = plan.acceleration
    if plan.device != "cuda" or not chosen.has("fused"):
        return chosen
    try:
        from klein import kernels

        kernels.keep_in(settings.kernel_cache.expanduser())
        error = _difference(plan, backend)
        if not error < 0.1:
            raise RuntimeError(f"the forward is wrong by {error:.0%}")
    except Exception as error:
        why = f"klein's kernels cannot be used here ({type(error).__name__}: {str(error)[:300]})"
        if settings.speed != "auto":
            raise ModelUnavailable(
                f"KLEIN_SPEED={settings.speed}: {why}; KLEIN_SPEED=eager needs none",
                field="KLEIN_SPEED",
            ) from error
        log.warning("%s: pictures take longer", why)
        return eager(why)
    return chosen


@torch.inference_mode()
def _difference(plan: Plan, backend: Backend) -> float:
    """|klein's velocity - diffusers'| / |diffusers'| (bfloat16 alone makes about 0.02)."""
    config = dict(Flux2Transformer2DModel.load_config(Path(plan.source) / "transformer"))
    config |= {"num_layers": 1, "num_single_layers": 1}
    with torch.device(plan.device):
        model = Flux2Transformer2DModel.from_config(config).eval()
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        ids = [torch.zeros(1, count, 4) for count in (48, 40)]
        for each in ids:
            each[..., 1:3] = torch.randint(0, 64, each[..., 1:3].shape)
        given = {
            "hidden_states": torch.randn(1, 48, model.config.in_channels, dtype=torch.bfloat16),
            "encoder_hidden_states": torch.randn(
                1, 40, model.config.joint_attention_dim, dtype=torch.bfloat16
            ),
            "timestep": torch.full((1,), 0.5, dtype=torch.bfloat16),
            "img_ids": ids[0],
            "txt_ids": ids[1],
        }
    theirs = model(**given, return_dict=False)[0].float()
    mine = FusedForward(model, backend.attend)(**given)[0].float()
    return float((mine - theirs).norm() / theirs.norm())


def _accelerate(pipe: Any, plan: Plan, backend: Backend) -> Sampler:
    """Put the plan's options on; what is returned stands in for the transformer's forward."""
    faster = plan.acceleration
    forward = pipe.transformer.forward
    if faster.has("fused"):
        forward = FusedForward(pipe.transformer, backend.attend)
    elif plan.device == "cuda":
        pipe.transformer.set_attention_backend(backend.diffusers)
    if faster.has("decoder"):
        decoder.fuse(pipe.vae)
    if faster.has("float8"):
        quantise(pipe.transformer, plan.device)
    if faster.has("graphed") and plan.device == "cuda":
        encoder = pipe.text_encoder
        encoder.forward = GraphedEncoder(encoder, plan.spec.max_sequence_length)
    thrift = THRIFT if faster.has("thrift") else None
    sampler = Sampler(forward, paired=faster.has("paired"), thrift=thrift)
    pipe.transformer.forward = sampler
    return sampler


def _place(pipe: Any, plan: Plan) -> Shuttle | None:
    """Spread the weights as planned; those that stay where they were read need nothing."""
    if plan.offload == "sequential":
        pipe.enable_sequential_cpu_offload()
    if plan.offload != "model":
        return None
    pipe.vae.to(plan.device)
    shuttle = Shuttle(plan.device, pipe.text_encoder, pipe.transformer)
    pin(shuttle.originals(pipe.text_encoder).values())
    pin(shuttle.originals(pipe.transformer).values())
    return shuttle


def _as_picture(image: Tensor) -> Image.Image:
    """A picture from (3, height, width), 0 to 1."""
    levels = (image.float() * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().cpu().numpy())
