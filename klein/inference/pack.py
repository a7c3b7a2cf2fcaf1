"""Writes a model as klein reads it fastest: what is not used left out, float8 where a tier uses it.

The result is a folder of diffusers' layout, one file a part. Its transformer in float8 is what
diffusers calls fp8r, a float32 scale for each row; its text encoder ends at the last layer that is
read.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from klein import __version__
from klein.errors import InvalidRequest, ModelUnavailable
from klein.inference.acceleration.ops import FP8, float8_rows
from klein.inference.loading import modules, single_file
from klein.inference.loading.reader import STEMS, read
from klein.models.checkpoint import Checkpoint
from klein.models.plan import Located

NOTE = "klein.json"
"""What a packed folder says of itself."""
FILES = {"text_encoder": STEMS[1], "vae": STEMS[0], "transformer": STEMS[0]}
_KEPT = ("*.json", "*.txt", "*.jinja")


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed part and its bytes."""

    part: str
    size: int


def pack(model: Located, to: Path, *, float8: bool) -> list[Packed]:
    """Write `model`, which is on disk, into the new folder `to`, and prove each file by reading it.

    With `float8` the linears of the blocks are quantised as the float8 tiers do it, on the GPU
    where there is one. Raises InvalidRequest for a folder that is not empty, ModelUnavailable for
    weights that cannot be read or that came out differently, OSError as the disk does.
    """
    if model.found is None:
        raise ModelUnavailable(f"{model.repo} is not on this machine: fetch it first")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise InvalidRequest(f"DIR: {to} is there already, and not empty", field="DIR")
    source = model.found.folder
    _copy_configurations(source, to)
    packed = []
    for part, stem in FILES.items():
        tensors = _tensors(part, source, model.checkpoint)
        if part == "transformer":
            tensors = _as_file(tensors, float8)
        target = to / part / f"{stem}.safetensors"
        save_file(tensors, target, {"format": "pt"})
        _prove(target, tensors)
        packed.append(Packed(part, target.stat().st_size))
    float8 = float8 or (model.checkpoint is not None and model.checkpoint.float8)
    _adapt_configurations(to, model, float8)
    _write_note(to, model, float8)
    return packed


def _tensors(part: str, source: Path, checkpoint: Checkpoint | None) -> dict[str, Tensor]:
    """A part's tensors in main memory as a start reads them, in bfloat16."""
    kind = torch.bfloat16
    if part == "transformer" and checkpoint:
        return single_file.read(checkpoint, "cpu", kind, keep_float8=True)
    last = modules.layers_below(modules.OUT_LAYERS[-1])
    wanted = last if part == "text_encoder" else modules.everything
    return read(source / part, "cpu", kind, wanted)


def _as_file(tensors: Mapping[str, Tensor], float8: bool) -> dict[str, Tensor]:
    """The transformer by the names of a file: float8 weights beside their `weight_scale` (rows)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer = name.rpartition(".")[0]
        if name.endswith(single_file.SCALE):
            made[f"{layer}.weight_scale"] = tensor.flatten()
        elif float8 and tensor.dtype != FP8 and single_file.is_block_linear(name):
            values, scale = float8_rows(tensor.to(device))
            made[name] = values.cpu()
            made[f"{layer}.weight_scale"] = scale.flatten().cpu()
        else:
            made[name] = tensor
    return made


def _prove(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise ModelUnavailable unless the file holds `tensors`, bit for bit, and no others."""
    with safe_open(path, "pt") as file:
        same = set(file.keys()) == set(tensors) and all(
            _is_same(file.get_tensor(name), tensor) for name, tensor in tensors.items()
        )
    if not same:
        raise ModelUnavailable(f"{path.name} was not written as it should be: check the disk")


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same type, shape and bytes."""
    as_bytes = (x.reshape(-1).view(torch.uint8) for x in (a, b))
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*as_bytes)


def _copy_configurations(source: Path, to: Path) -> None:
    """Everything of a model folder but its weights."""
    index = json.loads((source / "model_index.json").read_text())
    parts = [name for name, kind in index.items() if isinstance(kind, list) and kind[0]]
    for part in parts:
        (to / part).mkdir(parents=True)
        for path in (path for pattern in _KEPT for path in (source / part).glob(pattern)):
            if not path.name.endswith(".safetensors.index.json"):
                shutil.copyfile(path, to / part / path.name)
    shutil.copyfile(source / "model_index.json", to / "model_index.json")


def _adapt_configurations(to: Path, model: Located, float8: bool) -> None:
    """Say of the parts what they are now."""
    _change(to / "model_index.json", {"is_distilled": model.spec.distilled})
    told = {"quant_method": "bfl", "compute_dtype": "bfloat16"} if float8 else None
    _change(to / "transformer" / "config.json", {"quantization_config": told})
    path = to / "text_encoder" / "config.json"
    config = json.loads(path.read_text())
    layers = min(config["num_hidden_layers"], modules.OUT_LAYERS[-1])
    kinds = config.get("layer_types")
    _change(path, {"num_hidden_layers": layers, "layer_types": kinds and kinds[:layers]})


def _change(path: Path, values: Mapping[str, object]) -> None:
    """Write values into a configuration; None takes one out."""
    config = json.loads(path.read_text())
    for name, value in values.items():
        config.pop(name, None)
        if value is not None:
            config[name] = value
    path.write_text(json.dumps(config, indent=2))


def _write_note(to: Path, model: Located, float8: bool) -> None:
    """What the folder was made of, and under what license it stays."""
    found = model.found
    note = {
        "packed_by": f"klein {__version__}",
        "model": model.spec.name,
        "repository": model.repo,
        "revision": found.revision if found else None,
        "transformer": model.checkpoint.name if model.checkpoint else None,
        "for": "fast, turbo" if float8 else "every tier",
        "license": model.spec.license,
    }
    (to / NOTE).write_text(json.dumps(note, indent=2))
