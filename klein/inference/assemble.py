"""Puts a pipeline together as planned: weights, proof of the kernels, speed options, placement."""

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import Flux2KleinPipeline

from klein.errors import ModelUnavailable
from klein.inference.acceleration import attention
from klein.inference.acceleration import vae as decoder
from klein.inference.acceleration.attention import Backend
from klein.inference.acceleration.check import proved
from klein.inference.acceleration.text_encoder import GraphedEncoder
from klein.inference.acceleration.transformer import FusedForward, block_linears, quantise
from klein.inference.denoise import Sampler
from klein.inference.loading import modules as loading
from klein.inference.loading.reader import Weights
from klein.inference.offload import Shuttle, pin
from klein.inference.pipeline import KleinPipeline
from klein.lora.library import LoraLibrary
from klein.models import plan as preflight
from klein.models.plan import Plan
from klein.models.speed import THRIFT
from klein.settings import Settings

log = logging.getLogger("bentoml.klein")

TILE = 512
"""Side in pixels of a tile at most, where a picture is decoded in tiles."""


def load(
    plan: Plan,
    settings: Settings,
    library: LoraLibrary,
    begun: dict[str, Weights] | None = None,
) -> KleinPipeline:
    """Read the weights and place them; raises ModelUnavailable.

    `begun` is what klein.inference.loading has begun to read for this plan already.
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
    plan = replace(plan, acceleration=proved(plan, settings, backend))
    checked = time.perf_counter()
    pipe = _read(plan, settings, begun)
    _assert_klein(pipe, plan)
    pipe.set_progress_bar_config(disable=True)
    _set_tiles(pipe, settings)
    sampler = accelerate(pipe, plan, backend)
    shuttle = _place(pipe, plan)
    made = KleinPipeline(pipe, plan, settings, library, sampler, backend.label, shuttle)
    read = time.perf_counter()
    if plan.device == "cuda" and plan.offload == "none":
        made.warm_up()
    log.info(
        "%s loaded: kernels ready after %.1f s, weights after %.1f s, warm after %.1f s; %s; "
        "%s tier, %s",
        settings.model_id,
        checked - started,
        read - started,
        time.perf_counter() - started,
        plan.why,
        plan.acceleration.tier.name,
        backend.label,
    )
    return made


def _read(plan: Plan, settings: Settings, begun: dict[str, Weights]) -> Any:
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


def _set_tiles(pipe: Any, settings: Settings) -> None:
    pipe.vae.use_slicing = settings.vae_slicing
    tile = min(TILE, pipe.vae.config.sample_size)
    pipe.vae.tile_sample_min_size = tile
    pipe.vae.tile_latent_min_size = tile // pipe.vae_scale_factor


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


def accelerate(pipe: Any, plan: Plan, backend: Backend) -> Sampler:
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
        if plan.transformer_to != plan.device:
            pin(layer.weight.data for layer in block_linears(pipe.transformer).values())
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
