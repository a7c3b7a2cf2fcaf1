"""The parts of a pipeline, built empty while their weights are read."""

import copy
import logging
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from klein.inference.acceleration.ops import round_rows
from klein.inference.loading import single_file
from klein.inference.loading.reader import (
    FILE_SCALE,
    Device,
    TensorFilter,
    Weights,
    exact,
    read,
)
from klein.models.catalog import GB
from klein.models.plan import Plan

log = logging.getLogger(__name__)

BY_ROW = {"quant_method": "bfl", "compute_dtype": "bfloat16"}
"""What a part's configuration says of float8 rows."""
OUT_LAYERS = (9, 18, 27)
"""Hidden states of the text encoder that FLUX.2-klein reads; what comes after them is not."""


def _logged(part: str, reader: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `reader` reads; the log gets its size and seconds."""
    started = time.perf_counter()
    tensors = reader()
    size = sum(tensor.nbytes for tensor in tensors.values())
    if size > GB:
        seconds = time.perf_counter() - started
        log.info("%s: %.1f GB read in %.1f s", part, size / GB, seconds)
    return tensors


def everything(_: str) -> bool:
    """Every tensor."""
    return True


def dtype_on(device: str) -> torch.dtype:
    """What a model computes in there."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def start_reading(plan: Plan, dtype: torch.dtype | None = None) -> dict[str, Weights]:
    """Start to read the model's parts, one after another, and return at once.

    This needs no more than torch, so that it can go on while diffusers is imported. The parts are
    for the functions below. `dtype` is `dtype_on` the plan's device unless given.
    """
    folder, dtype = Path(plan.source), dtype or dtype_on(plan.device)
    one = ThreadPoolExecutor(1, thread_name_prefix="klein-weights")
    to, transformer_to = exact(plan.read_to), exact(plan.transformer_to)
    quantise_on = exact(plan.device) if plan.acceleration.has("float8_text") else None
    readers: dict[str, Callable[[], dict[str, Tensor]]] = {
        "text_encoder": partial(text_weights, folder / "text_encoder", to, dtype, quantise_on),
        "vae": partial(read, folder / "vae", to, dtype, everything),
        "transformer": partial(read, folder / "transformer", transformer_to, dtype, everything),
    }
    if plan.checkpoint:
        readers["transformer"] = partial(
            single_file.read,
            plan.checkpoint,
            transformer_to,
            dtype,
            keep_float8=plan.keeps_float8,
        )
    pending = {name: one.submit(_logged, name, reader) for name, reader in readers.items()}
    one.shutdown(wait=False)
    return pending


def transformer(
    folder: Path,
    device: Device,
    dtype: torch.dtype,
    weights: Weights | None = None,
    *,
    recognised: bool = False,
) -> Any:
    """The Flux2Transformer2DModel in `folder` on `device`, for inference; raises as `_load`.

    `weights` are those that `start_reading` reads already; here as below. `recognised` says that
    they are a checkpoint's, whatever the configuration says of the folder's own.
    """
    build = partial(_empty_diffusers, "Flux2Transformer2DModel", folder, recognised)
    return _load(folder, device, dtype, build, weights=weights)


def vae(folder: Path, device: Device, dtype: torch.dtype, weights: Weights | None = None) -> Any:
    """The AutoencoderKLFlux2 in `folder` on `device`, for inference; raises as `_load`."""
    build = partial(_empty_diffusers, "AutoencoderKLFlux2", folder)
    return _load(folder, device, dtype, build, weights=weights)


def text_weights(
    folder: Path, device: Device, dtype: torch.dtype, quantise_on: Device | None
) -> dict[str, Tensor]:
    """What is used of a text encoder's tensors, on `device`; raises as `reader.read`.

    With a device to `quantise_on` the linears' weights are float8 rows, the file's or made there,
    and their scales come as `LAYER.float8_scale`. Without, a file's float8 weights become `dtype`,
    multiplied out in float32.
    """
    tensors = read(folder, device, dtype, layers_below(OUT_LAYERS[-1]), keep_float8=True)
    for name in [name for name in tensors if is_text_linear(name)]:
        layer, weight = name.removesuffix(".weight"), tensors[name]
        scale = tensors.pop(f"{layer}.{FILE_SCALE}", None)
        if scale is None and weight.dtype == single_file.FLOAT8:
            scale = torch.ones(len(weight), device=weight.device)
        if quantise_on is None:
            if scale is not None:
                tensors[name] = (weight.float() * scale.view(-1, 1)).to(dtype)
            continue
        if scale is None:
            values, scale = (part.to(weight.device) for part in round_rows(weight.to(quantise_on)))
            tensors[name] = values
        tensors[f"{layer}.{single_file.SCALE}"] = scale.view(1, -1)
    return tensors


def is_text_linear(name: str) -> bool:
    """Whether a tensor of the text encoder is a weight that the float8 tiers quantise."""
    return name.startswith("model.layers.") and name.endswith("_proj.weight")


def text_encoder(
    folder: Path,
    config: Any,
    device: Device,
    dtype: torch.dtype,
    weights: Weights | None = None,
) -> Any:
    """The Qwen3ForCausalLM of `config` with weights from `folder`, for inference.

    Layers that `config` does not count are not read, nor are the head and the last norm, which are
    Identity: what is left gives the hidden states up to the last layer, unnormed. Raises as
    `_load`.
    """
    build = partial(_empty_text_encoder, config, dtype)
    wanted = layers_below(config.num_hidden_layers)
    return _load(folder, device, dtype, build, wanted, weights)


# -- models ------------------------------------------------------------------------------------


def _load(
    folder: Path,
    device: Device,
    dtype: torch.dtype,
    build: Callable[[], Any],
    wanted: TensorFilter = everything,
    weights: Weights | None = None,
) -> Any:
    """The model that `build` makes without weights, with them; it is built while they are read.

    Raises ValueError for damaged or quantised weights, and for missing ones with their names;
    RuntimeError for shapes that are not the configuration's.
    """
    device = exact(device)
    with ThreadPoolExecutor(1, thread_name_prefix="klein-weights") as background:
        weights = weights or background.submit(read, folder, device, dtype, wanted)
        model = build()
        tensors = weights.result()
        for name in [name for name in tensors if name.endswith(single_file.SCALE)]:
            layer = model.get_submodule(name.removesuffix(f".{single_file.SCALE}"))
            layer.register_buffer(single_file.SCALE, tensors.pop(name), persistent=False)
        missing, _ = model.load_state_dict(tensors, strict=False, assign=True)
    if missing:
        raise ValueError(
            f"the weights in {folder.name} lack {len(missing)} tensors, {', '.join(missing[:3])} "
            "among them: download them again, or take the config.json that belongs to them"
        )
    return model.to(device).requires_grad_(False).eval()


def _empty_diffusers(kind: str, folder: Path, recognised: bool = False) -> Any:
    """A model of diffusers as config.json says, its parameters on the meta device."""
    import diffusers

    made = getattr(diffusers, kind)
    config = dict(made.load_config(folder))
    if config.pop("quantization_config", None) and not recognised:
        raise _refused(kind)
    with _without_weights():
        return made.from_config(config)


def _empty_text_encoder(config: Any, dtype: torch.dtype) -> Any:
    """The text encoder with parameters on the meta device and real buffers: no file holds those."""
    from transformers import AutoModelForCausalLM

    if getattr(config, "quantization_config", None):
        raise _refused("text encoder")
    with _without_weights():
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    model.model.norm = torch.nn.Identity()
    model.lm_head = torch.nn.Identity()
    return model


def _without_weights() -> AbstractContextManager[None]:
    """Models made inside have their parameters on the meta device, and real buffers."""
    from accelerate import init_empty_weights  # type: ignore[import-untyped]

    made: AbstractContextManager[None] = init_empty_weights(include_buffers=False)
    return made


def _refused(what: str) -> ValueError:
    return ValueError(f"this {what} is quantised: use the model's bfloat16 weights")


def layers_below(count: int) -> TensorFilter:
    """Every tensor of the text encoder but the head, the last norm and layers from `count` on."""
    layer = re.compile(r"model\.layers\.(\d+)\.")

    def wanted(name: str) -> bool:
        found = layer.match(name)
        if found:
            return int(found[1]) < count
        return not name.startswith(("lm_head.", "model.norm."))

    return wanted
