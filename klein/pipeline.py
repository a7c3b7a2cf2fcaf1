"""The real pipeline: loads FLUX.2-klein as planned, places it, samples and decodes.

The only module besides adapters that imports torch and diffusers when it is imported.
"""

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
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
from torch import Tensor

from klein import __version__, schedule, sizes, weights
from klein.adapters import LoraMerger, Wanted
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
from klein.errors import InternalError, LoraError, ModelUnavailable, OutOfMemory
from klein.lora.file import LoraFile
from klein.lora.library import LoraLibrary
from klein.lora.reference import shown
from klein.models import GB
from klein.preflight import Plan
from klein.resolve import settle_loras
from klein.settings import Settings

log = logging.getLogger("bentoml.klein")

OUT_LAYERS = (9, 18, 27)
"""Hidden states of the text encoder that FLUX.2-klein reads."""
EMBEDS_KEPT = 16
DECODE_BYTES_PER_PIXEL = 3 * GB / 1024**2
"""Working memory of an untiled decode: an estimate."""


class KleinPipeline:
    """One model on one device, and the LoRAs on it. One job at a time."""

    def __init__(
        self,
        pipe: Flux2KleinPipeline,
        plan: Plan,
        settings: Settings,
        library: LoraLibrary,
        attention: str,
    ) -> None:
        self._pipe = pipe
        self._plan = plan
        self._settings = settings
        self._library = library
        self._merger = LoraMerger(pipe.transformer, plan.spec)
        self._scheduler = pipe.scheduler
        self._embeds: OrderedDict[tuple[str, int], Tensor] = OrderedDict()
        self._forwards = 0
        pipe.transformer.register_forward_pre_hook(self._count)
        self.info = ModelInfo(
            id=Path(settings.model_id).name if plan.local else settings.model_id,
            revision=plan.revision,
            spec=plan.spec,
            device=torch.cuda.get_device_name() if plan.device == "cuda" else "cpu",
            dtype=str(pipe.transformer.dtype).removeprefix("torch."),
            placement=plan.why,
            attention=attention,
            versions={
                "klein": __version__,
                "torch": torch.__version__,
                "diffusers": diffusers.__version__,
                "transformers": transformers.__version__,
            },
        )

    def facts(self) -> dict[str, Any]:
        """GPU memory in bytes, where there is a GPU."""
        if self._plan.device != "cuda":
            return {}
        free, total = torch.cuda.mem_get_info()
        return {"gpu_memory_free": free, "gpu_memory_total": total}

    def generate(self, job: Job) -> GenerationResult:
        """Make the job's pictures, one after another, so that each is the same alone.

        Raises a KleinError; whatever it raises, the next job finds the pipeline clean.
        """
        clock = _Clock(job.submitted)
        if job.loras is None:
            self.prepare(job)
        params, warnings = job.params, list(job.warnings)
        self._forwards = 0
        try:
            job.check()
            with torch.inference_mode():
                reports = self._put_loras(job, warnings)
                clock.lap("lora")
                embeds = self._encode(params, warnings)
                clock.lap("text")
                self._choose_tiling(params, warnings)
                images = tuple(self._draw(job, embeds, i, clock) for i in range(params.num_images))
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise OutOfMemory(
                f"{params.width}×{params.height} did not fit into GPU memory: ask for a smaller "
                "picture, or start klein with KLEIN_VAE_TILING=on or KLEIN_OFFLOAD=model"
            ) from error
        finally:
            used = self._pipe.scheduler
            self._pipe.scheduler = self._scheduler
            self._pipe.maybe_free_model_hooks()
        mu, sigmas = self._check_schedule(params, used)
        return GenerationResult(
            id=job.id,
            params=params,
            images=images,
            loras=tuple(reports),
            mu=mu,
            sigmas=sigmas,
            forwards=self._forwards,
            timings=clock.seconds(),
            warnings=tuple(warnings),
            model=self.info,
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
        before = self._forwards
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
            callback_on_step_end=on_step,
        )
        clock.lap("decode")
        expected = steps * (1 if embeds[1] is None else 2)
        if self._forwards - before != expected:
            raise InternalError(
                f"{self._forwards - before} transformer forwards were run instead of {expected}"
            )
        return GeneratedImage(seed, output.images[0])

    def _count(self, *_: Any) -> None:
        self._forwards += 1

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
        need = params.width * params.height * DECODE_BYTES_PER_PIXEL
        tiled = self._settings.vae_tiling == "on"
        if self._settings.vae_tiling == "auto" and self._plan.device == "cuda":
            free, _ = torch.cuda.mem_get_info()
            tiled = free < need
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


def load(plan: Plan, settings: Settings, library: LoraLibrary) -> KleinPipeline:
    """Read the weights and place them; minutes for the 9B model. Raises ModelUnavailable."""
    if plan.device == "cuda" and not torch.cuda.is_available():
        raise ModelUnavailable(
            f"torch {torch.__version__} cannot use this GPU: install a CUDA build that fits the "
            "driver, or use MODEL_ID=nano with KLEIN_DEVICE=cpu"
        )
    if plan.download:
        token = settings.hf_token.value if settings.hf_token else None
        fetched = weights.download(plan.source, plan.revision, token)
        plan = replace(plan, source=str(fetched.folder), revision=fetched.revision)
    started = time.perf_counter()
    log.info("reading the weights from %s: %s", plan.found_in, plan.source)
    _quiet(small=not plan.spec.needs_gpu)
    dtype = torch.bfloat16 if plan.device == "cuda" else torch.float32
    where: dict[str, Any] = {"use_safetensors": True, "local_files_only": True}
    try:
        encoder = _cut_text_encoder(plan, dtype, where)
        pipe = Flux2KleinPipeline.from_pretrained(
            plan.source, text_encoder=encoder, dtype=dtype, **where
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelUnavailable(
            f"{settings.model_id} from {plan.found_in} could not be loaded "
            f"({type(error).__name__}): {str(error)[:300]}"
        ) from error
    _assert_klein(pipe, plan)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.use_slicing = settings.vae_slicing
    _place(pipe, plan)
    attention = _choose_attention(pipe.transformer, plan.device)
    seconds = time.perf_counter() - started
    log.info("%s loaded in %.1f s, %s; %s", settings.model_id, seconds, plan.why, attention)
    return KleinPipeline(pipe, plan, settings, library, attention)


def _quiet(*, small: bool) -> None:
    """No report on the layers that are left out on purpose; no bars for a model read in a blink."""
    transformers.utils.logging.set_verbosity_error()
    if small:
        transformers.utils.logging.disable_progress_bar()
        diffusers.utils.logging.disable_progress_bar()


def _cut_text_encoder(plan: Plan, dtype: torch.dtype, where: dict[str, Any]) -> Any:
    """The text encoder without the layers after the last hidden state that is read.

    transformers replaces the last hidden state by its normed form, so that norm goes too; what
    is left is bit-identical to the whole encoder's states 9, 18 and 27.
    """
    config = transformers.AutoConfig.from_pretrained(plan.source, subfolder="text_encoder")
    config.num_hidden_layers = min(config.num_hidden_layers, OUT_LAYERS[-1])
    if layer_types := getattr(config, "layer_types", None):
        config.layer_types = layer_types[: config.num_hidden_layers]
    encoder = transformers.Qwen3ForCausalLM.from_pretrained(
        plan.source, subfolder="text_encoder", config=config, dtype=dtype, **where
    )
    encoder.model.norm = torch.nn.Identity()
    encoder.lm_head = torch.nn.Identity()
    return encoder


def _assert_klein(pipe: Any, plan: Plan) -> None:
    """What later code relies on, said before the first picture and not after."""
    if not pipe.scheduler.config.use_dynamic_shifting:
        raise ModelUnavailable("this model's scheduler does not shift dynamically: not FLUX.2")
    if bool(pipe.config.is_distilled) != plan.spec.distilled:
        kind = "distilled" if pipe.config.is_distilled else "not distilled"
        raise ModelUnavailable(
            f"model_index.json says {kind}, and {plan.spec.name} is the opposite"
        )


def _choose_attention(transformer: Any, device: str) -> str:
    """flash-attn where it is installed and really runs, else torch's own; says which, and why."""
    own = "torch's own attention"
    if device != "cuda":
        return own
    try:
        return _flash_attention(transformer, device)
    except ModuleNotFoundError:
        return f"{own} (flash-attn is not installed)"
    except Exception as error:  # built for another torch, or not for this GPU
        log.warning("flash-attn cannot be used here: %s", str(error)[:300])
        return f"{own} (flash-attn is installed but failed: {type(error).__name__})"


def _flash_attention(transformer: Any, device: str) -> str:
    """Switch `transformer` to flash-attn after trying it; raises whatever that raises."""
    import flash_attn

    probe = torch.randn(1, 16, 1, 128, device=device, dtype=torch.bfloat16)
    flash_attn.flash_attn_func(probe, probe, probe)
    transformer.set_attention_backend("flash")
    return f"flash-attn {flash_attn.__version__}"


def _place(pipe: Any, plan: Plan) -> None:
    match plan.offload:
        case "model":
            pipe.enable_model_cpu_offload()
        case "sequential":
            pipe.enable_sequential_cpu_offload()
        case _:
            pipe.to(plan.device)
