"""Puts a pipeline together as planned: weights, proof of the kernels, speed options, placement."""

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from klein.errors import ModelUnavailable
from klein.inference import offload
from klein.inference.acceleration import attention, vae
from klein.inference.acceleration.attention import Backend
from klein.inference.acceleration.check import proved
from klein.inference.acceleration.text_encoder import CudaGraphEncoder, use_float8
from klein.inference.acceleration.transformer import FusedForward, block_linears, quantise
from klein.inference.denoise import Forward
from klein.inference.loading import modules
from klein.inference.loading.reader import Weights
from klein.inference.offload import ModelOffloader
from klein.inference.pipeline import KleinPipeline, Parts
from klein.models.plan import Plan, fetched
from klein.models.speed import Acceleration
from klein.settings import Settings

log = logging.getLogger(__name__)

TILE = 512
"""Side in pixels of a tile at most, where an image is decoded in tiles."""


def load(
    plan: Plan,
    settings: Settings,
    pending_weights: Mapping[str, Weights] | None = None,
    dtype: torch.dtype | None = None,
) -> KleinPipeline:
    """Read the weights and place them; raises ModelUnavailable.

    `pending_weights` are what `start_reading` reads for this plan already. `dtype` is what the
    model computes in: bfloat16 on a GPU and float32 on the CPU unless given.
    """
    if plan.on_gpu and not torch.cuda.is_available():
        raise ModelUnavailable(
            f"torch {torch.__version__} cannot use this GPU: install a CUDA build that fits the "
            "driver, or use MODEL_ID=nano with KLEIN_DEVICE=cpu"
        )
    started = time.perf_counter()
    plan = fetched(plan, settings)
    pending_weights = pending_weights or modules.start_reading(plan, dtype)
    log.info("reading the weights from %s: %s", plan.found_in, plan.source)
    for note in plan.notes:
        log.info("%s", note)
    backend = attention.choose(
        settings.attention,
        plan.device,
        plan.target.capability,
        fused=plan.acceleration.has("fused"),
    )
    plan = replace(plan, acceleration=proved(plan, settings, backend))
    checked = time.perf_counter()
    parts = _read(plan, settings, pending_weights, dtype or modules.dtype_on(plan.device))
    pipeline = build(parts, plan, settings, backend)
    read = time.perf_counter()
    if plan.on_gpu and plan.offload == "none":
        pipeline.warm_up()
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
    return pipeline


def build(parts: Parts, plan: Plan, settings: Settings, backend: Backend) -> KleinPipeline:
    """A pipeline of `parts`, which lie where `plan` reads them to: accelerated and placed."""
    parts.vae.use_slicing = settings.vae_slicing
    parts.vae.tile_sample_min_size = min(TILE, parts.vae.config.sample_size)
    scale = 2 ** (len(parts.vae.config.block_out_channels) - 1)
    parts.vae.tile_latent_min_size = parts.vae.tile_sample_min_size // scale
    stock = parts
    parts = _accelerated(parts, plan, backend)

    def parts_for(faster: Acceleration) -> Parts:
        """The same weights as they run in the tier of `faster`."""
        if plan.acceleration.has("decoder"):
            (vae.fuse if faster.has("decoder") else vae.unfuse)(parts.vae)
        return replace(
            parts,
            denoiser=_denoiser(parts.transformer, faster, backend),
            encoder=parts.encoder if faster.has("cuda_graph") else stock.encoder,
        )

    return KleinPipeline(parts, plan, settings, backend.label, _placed(parts, plan), parts_for)


def plain(transformer: Any, vae: Any, text_encoder: Any, tokenizer: Any) -> Parts:
    """Parts that run as diffusers and transformers run them."""
    return Parts(transformer, vae, text_encoder, tokenizer, _stock(transformer), text_encoder)


def _stock(transformer: Any) -> Forward:
    return partial(transformer, return_dict=False)


def _denoiser(transformer: Any, faster: Acceleration, backend: Backend) -> Forward:
    """The transformer's forward in the tier of `faster`."""
    if not faster.has("fused"):
        return _stock(transformer)
    return FusedForward(transformer, backend.attend, float8=faster.has("float8"))


def _read(
    plan: Plan, settings: Settings, pending: Mapping[str, Weights], dtype: torch.dtype
) -> Parts:
    """The parts with their weights where they are used first; raises ModelUnavailable."""
    folder = Path(plan.source)
    _quiet()
    try:
        _require_klein(folder, plan)
        return plain(
            text_encoder=modules.text_encoder(
                folder / "text_encoder",
                _cut_config(folder),
                plan.read_to,
                dtype,
                pending["text_encoder"],
            ),
            vae=modules.vae(folder / "vae", plan.read_to, dtype, pending["vae"]),
            transformer=modules.transformer(
                folder / "transformer",
                plan.transformer_to,
                dtype,
                pending["transformer"],
                recognised=plan.checkpoint is not None,
            ),
            tokenizer=transformers.Qwen2Tokenizer.from_pretrained(
                folder / "tokenizer", local_files_only=True
            ),
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelUnavailable(
            f"{settings.model_id} from {plan.found_in} could not be loaded "
            f"({type(error).__name__}): {str(error)[:300]}"
        ) from error


def _quiet() -> None:
    """No report on layers that are left out on purpose, and no bars: klein reads the weights."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()


def _cut_config(folder: Path) -> Any:
    """The text encoder's configuration without the layers after the last state that is read."""
    config = transformers.AutoConfig.from_pretrained(folder, subfolder="text_encoder")
    if getattr(config, "quantization_config", None) == modules.BY_ROW:
        del config.quantization_config
    config.num_hidden_layers = min(config.num_hidden_layers, modules.OUT_LAYERS[-1])
    if layer_types := getattr(config, "layer_types", None):
        config.layer_types = layer_types[: config.num_hidden_layers]
    return config


_SHIFT = {
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "invert_sigmas": False,
    "stochastic_sampling": False,
}
"""How FLUX.2's scheduler is set, and klein samples."""


def _require_klein(folder: Path, plan: Plan) -> None:
    """What later code relies on, said before the first image and not after."""
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    stock = {"use_dynamic_shifting": False}
    for name, value in _SHIFT.items():
        if scheduler.get(name, stock.get(name, value)) != value:
            raise ModelUnavailable(
                f"this model's scheduler is not FLUX.2's: its {name} is not {value}"
            )
    distilled = bool(json.loads((folder / "model_index.json").read_text()).get("is_distilled"))
    if distilled != plan.spec.distilled and plan.checkpoint is None:
        kind = "distilled" if distilled else "not distilled"
        raise ModelUnavailable(
            f"model_index.json says {kind}, and {plan.spec.name} is the opposite"
        )


def _accelerated(parts: Parts, plan: Plan, backend: Backend) -> Parts:
    """The parts with the plan's speed options on."""
    faster = plan.acceleration
    transformer, encoder = parts.transformer, parts.text_encoder
    parts = replace(parts, denoiser=_denoiser(transformer, faster, backend))
    if plan.on_gpu:
        transformer.set_attention_backend(backend.diffusers)
    if faster.has("decoder"):
        vae.fuse(parts.vae)
    if faster.has("float8"):
        quantise(transformer, plan.read_to)
        if plan.transformer_to != plan.read_to:
            offload.pin(layer.weight.data for layer in block_linears(transformer).values())
    if faster.has("float8_text"):
        use_float8(encoder)
    if faster.has("cuda_graph") and plan.on_gpu:
        recorded = CudaGraphEncoder(encoder, plan.spec.max_sequence_length)
        parts = replace(parts, encoder=recorded)
    return parts


def _placed(parts: Parts, plan: Plan) -> ModelOffloader | None:
    """Spread the weights as planned; those that stay where they were read need nothing."""
    if plan.offload == "sequential":
        offload.sequentially(plan.device, parts.transformer, parts.vae, parts.text_encoder)
    if plan.offload != "model":
        return None
    parts.vae.to(plan.device)
    offloader = ModelOffloader(plan.device, parts.text_encoder, parts.transformer)
    offload.pin(offloader.originals(parts.text_encoder).values())
    offload.pin(offloader.originals(parts.transformer).values())
    return offloader
