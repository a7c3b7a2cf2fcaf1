"""Writes a model as klein reads it fastest: what is not used left out, float8 where a tier uses it.

The result is a folder of diffusers' layout, one file a part. Its transformer in float8 is what
diffusers calls fp8r, a float32 scale for each row, and so are the linears of its text encoder,
which ends at the last layer that is read. It is written beside its place and moved there when it is
whole.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from klein import __version__
from klein.errors import InvalidRequest, ModelUnavailable
from klein.inference.acceleration.ops import float8_rows
from klein.inference.loading import modules, single_file
from klein.inference.loading.reader import FILE_SCALE, STEMS, read
from klein.models.checkpoint import Checkpoint
from klein.models.plan import Located

NOTE = "klein.json"
"""What a packed folder says of itself."""
FILES = {"text_encoder": STEMS[1], "vae": STEMS[0], "transformer": STEMS[0]}
UNFINISHED = ".unfinished"
"""What the name of a folder that is being packed ends with."""
_KEPT = ("*.json", "*.txt", "*.jinja")


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed part and its bytes."""

    part: str
    size: int


def pack(model: Located, to: Path, *, float8: bool, float8_text: bool) -> list[Packed]:
    """Write `model`, which is on disk, into the new folder `to`, and prove each file by reading it.

    With `float8` the linears of the blocks are quantised as the float8 tiers do it, on the GPU
    where there is one, and with `float8_text` those of the text encoder. What is left of a pack
    that was interrupted is deleted first. Raises InvalidRequest for a folder that is not empty or
    is being packed, ModelUnavailable for weights that cannot be read or that came out differently,
    OSError as the disk does; `to` is then as it was.
    """
    if model.found is None:
        raise ModelUnavailable(f"{model.repo} is not on this machine: fetch it first")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise InvalidRequest(f"DIR: {to} is there already, and not empty", field="DIR")
    source = model.found.folder
    with _moved_when_whole(to) as folder:
        packed = [
            _write(part, folder, _tensors(part, source, model.checkpoint, float8, float8_text))
            for part in FILES
        ]
        float8 = float8 or (model.checkpoint is not None and model.checkpoint.float8)
        _write_configurations(source, folder, model.spec.distilled, float8, float8_text)
        _write_note(folder, model, float8)
    return packed


@contextmanager
def _moved_when_whole(to: Path) -> Iterator[Path]:
    """A new folder beside `to` that becomes `to` if nothing is raised, and is deleted if so.

    One that a process which is no more has left there is deleted first. Raises InvalidRequest while
    another writes it.
    """
    to = to.resolve()
    folder = to.with_name(f"{to.name}{UNFINISHED}")
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise InvalidRequest(f"DIR: {to} is being packed already", field="DIR") from None
    try:
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield folder
        folder.replace(to)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _write(part: str, folder: Path, tensors: dict[str, Tensor]) -> Packed:
    """Write a part's file, on the disk when this returns, and read it back."""
    target = folder / part / f"{FILES[part]}.safetensors"
    target.parent.mkdir()
    try:
        save_file(tensors, target, {"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{target} could not be written: {error}") from error
    with target.open("rb") as file:
        os.fsync(file)
    _prove(target, tensors)
    return Packed(part, target.stat().st_size)


def _tensors(
    part: str, source: Path, checkpoint: Checkpoint | None, float8: bool, float8_text: bool
) -> dict[str, Tensor]:
    """A part's tensors in main memory by the names of a file: float8 weights beside their
    `weight_scale` (rows), others in bfloat16."""
    kind, device = torch.bfloat16, "cuda" if torch.cuda.is_available() else "cpu"
    if part == "text_encoder":
        on = device if float8_text else None
        tensors = modules.text_weights(source / part, "cpu", kind, on)
    elif part == "transformer" and checkpoint:
        tensors = single_file.read(checkpoint, "cpu", kind, keep_float8=True)
    else:
        tensors = read(source / part, "cpu", kind, modules.everything)
    if part == "transformer" and float8:
        _quantise(tensors, device)
    return _as_file(tensors)


def _quantise(tensors: dict[str, Tensor], device: str) -> None:
    """Make the transformer's block linears float8 rows as the tiers do on `device`, in place."""
    for name in [name for name in tensors if single_file.is_block_linear(name)]:
        if tensors[name].dtype == torch.bfloat16:
            values, scale = float8_rows(tensors[name].to(device))
            tensors[name] = values.cpu()
            tensors[f"{name.removesuffix('weight')}{single_file.SCALE}"] = scale.cpu()


def _as_file(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with scales by the name and in the shape (rows) of a file."""
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(single_file.SCALE):
            made[f"{name.removesuffix(single_file.SCALE)}{FILE_SCALE}"] = tensor.flatten()
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


def _write_configurations(
    source: Path, to: Path, distilled: bool, float8: bool, float8_text: bool
) -> None:
    """Everything of a model folder but its weights, saying of the parts what they are now; last
    the index, without which the folder is no model."""
    index = json.loads((source / "model_index.json").read_text())
    parts = [name for name, kind in index.items() if isinstance(kind, list) and kind[0]]
    for part in parts:
        (to / part).mkdir(exist_ok=True)
        for path in (path for pattern in _KEPT for path in (source / part).glob(pattern)):
            if not path.name.endswith(".safetensors.index.json"):
                shutil.copyfile(path, to / part / path.name)
    rows = modules.BY_ROW
    _change(to / "transformer" / "config.json", {"quantization_config": rows if float8 else None})
    path = to / "text_encoder" / "config.json"
    config = json.loads(path.read_text())
    layers = min(config["num_hidden_layers"], modules.OUT_LAYERS[-1])
    kinds = config.get("layer_types")
    cut = {"num_hidden_layers": layers, "layer_types": kinds and kinds[:layers]}
    _change(path, cut | {"quantization_config": rows if float8_text else None})
    made = to / "model_index.json"
    made.write_text(json.dumps(index | {"is_distilled": distilled}, indent=2))


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
