"""Reads a transformer out of one file, by whosever names its tensors go, straight to the device."""

from collections.abc import Mapping

import torch
from safetensors import safe_open
from torch import Tensor

from klein.inference.loading.reader import Device, exact, fill
from klein.models.checkpoint import Checkpoint, Stored
from klein.sources.safetensors import Entry

FLOAT8 = torch.float8_e4m3fn
SCALE = "float8_scale"
"""The buffer (1, rows) float32 of a linear whose weight is float8."""


def read(
    found: Checkpoint, device: Device, dtype: torch.dtype, *, keep_float8: bool
) -> dict[str, Tensor]:
    """The parameters of `found` by diffusers' names, in `dtype`, on `device`.

    With `keep_float8` the float8 weights of block linears stay so, and their scales come as
    `LAYER.float8_scale`; all others are multiplied out in float32. Raises as `reader.read`.
    """
    device = exact(device)
    weights: dict[str, Tensor] = {}
    scales = {stored.scale: torch.empty(0) for stored in found.tensors.values() if stored.scale}

    def place(entry: Entry) -> list[Tensor]:
        if entry.name in scales:
            scales[entry.name] = torch.empty(entry.shape, dtype=torch.float32, device=device)
            return [scales[entry.name]]
        stored = found.tensors.get(entry.name)
        if stored is None:
            return []
        kind = FLOAT8 if stored.float8 else dtype
        made = {
            name: torch.empty((rows, *entry.shape[1:]), dtype=kind, device=device)
            for name, rows in stored.parameters
        }
        weights.update(made)
        if stored.swapped_halves:
            return [half for tensor in made.values() for half in reversed(tensor.chunk(2))]
        return list(made.values())

    fill(found.files, device, place)
    for stored in found.tensors.values():
        if stored.float8:
            _settle(stored, weights, scales, dtype, keep_float8)
    return weights


def is_block_linear(name: str) -> bool:
    """Whether a float8 tier acts through float8 of the weight of that name."""
    return "transformer_blocks." in name and ".norm_" not in name


class Parameters:
    """A checkpoint's parameters one by one, each read when it is asked for."""

    def __init__(self, found: Checkpoint) -> None:
        self._places: dict[str, tuple[str, Stored, slice]] = {}
        for tensor, stored in found.tensors.items():
            start = 0
            for name, rows in stored.parameters:
                self._places[name] = tensor, stored, slice(start, start + rows)
                start += rows
        self._files = {}
        for path in found.files:
            with safe_open(path, "pt") as file:
                self._files.update(dict.fromkeys(file.keys(), path))

    @property
    def names(self) -> list[str]:
        """diffusers' names, sorted."""
        return sorted(self._places)

    def read(self, name: str) -> Tensor:
        """One parameter, float32 in main memory."""
        tensor, stored, rows = self._places[name]
        with safe_open(self._files[tensor], "pt") as file:
            weight: Tensor = file.get_slice(tensor)[rows].float()
            if stored.scale:
                scale = file.get_tensor(stored.scale).float().flatten()
                weight *= (scale if scale.numel() == 1 else scale[rows])[:, None]
        return torch.cat(weight.chunk(2)[::-1]) if stored.swapped_halves else weight


def _settle(
    stored: Stored,
    weights: dict[str, Tensor],
    scales: Mapping[str, Tensor],
    dtype: torch.dtype,
    keep_float8: bool,
) -> None:
    """Give float8 weights their scales, as a buffer or by multiplying."""
    like = weights[stored.parameters[0][0]]
    scale = scales[stored.scale] if stored.scale else torch.ones(1, device=like.device)
    by_row = scale.flatten().expand(sum(rows for _, rows in stored.parameters))
    if stored.swapped_halves:
        by_row = torch.cat(by_row.chunk(2)[::-1])
    start = 0
    for name, rows in stored.parameters:
        share = by_row[start : start + rows]
        if keep_float8 and is_block_linear(name):
            weights[f"{name.removesuffix('weight')}{SCALE}"] = share[None].contiguous()
        else:
            weights[name] = (weights[name].float() * share[:, None]).to(dtype)
        start += rows
