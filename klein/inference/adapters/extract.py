"""Writes the difference of two models of one shape as a LoRA: for a base model to draw as the
other does, with other LoRAs on.

Each linear's difference is cut to its largest singular values (Eckart–Young: no product of that
rank is nearer). One layer of both models is in memory at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from klein.errors import ModelUnavailable
from klein.inference.loading import single_file
from klein.models.checkpoint import Checkpoint

WHOLE = 2048
"""Up to this shorter side a matrix is decomposed whole; above, by a randomised method (Halko 2011)
with so many more directions than asked for, and rounds:"""
MORE, ROUNDS = 32, 6


@dataclass(frozen=True, slots=True)
class Extracted:
    """What came of it: layers with a difference, the share of the differences' energy (squared
    Frobenius norm) that is kept of all and of the worst layer, and norms that differ, which no LoRA
    can hold."""

    layers: int
    kept: float
    least_kept: float
    least_kept_layer: str
    norms_left_out: int


def extract(model: Checkpoint, base: Checkpoint, rank: int, to: Path) -> Extracted:
    """Write `model` - `base` as a LoRA of `rank` in bfloat16, by diffusers' names.

    Raises ModelUnavailable for models of different shapes, or with no difference.
    """
    _require_same_shape(model, base)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors: dict[str, Tensor] = {}
    energies: dict[str, tuple[float, float]] = {}
    norms = 0
    for name, ours, theirs in _pairs(model, base):
        difference = ours.to(device) - theirs.to(device)
        whole = float(difference.double().square().sum())
        if whole == 0:
            continue
        if difference.ndim == 1:
            norms += 1
            continue
        up, down, kept = _factors(difference, rank)
        layer = f"transformer.{name.removesuffix('.weight')}"
        tensors[f"{layer}.lora_A.weight"] = down.to("cpu", torch.bfloat16)
        tensors[f"{layer}.lora_B.weight"] = up.to("cpu", torch.bfloat16)
        energies[name] = whole, kept
    if not tensors:
        raise ModelUnavailable(f"{model.name} and {base.name} have the same linears: no LoRA")
    save_file(tensors, to, {"format": "pt", "name": f"{model.name} minus {base.name}"})
    return _report(energies, norms)


def _pairs(model: Checkpoint, base: Checkpoint) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Every parameter of both, float32 in main memory, by diffusers' name."""
    ours, theirs = single_file.Parameters(model), single_file.Parameters(base)
    for name in ours.names:
        yield name, ours.read(name), theirs.read(name)


def _factors(difference: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """(out, rank), (rank, in) and the energy of their product."""
    short = min(difference.shape)
    if short <= WHOLE:
        left, sizes, right = torch.linalg.svd(difference, full_matrices=False)
    else:
        left, sizes, right = torch.svd_lowrank(difference, min(rank + MORE, short), ROUNDS)
        right = right.T
    left, sizes, right = left[:, :rank], sizes[:rank], right[:rank]
    roots = sizes.sqrt()
    up, down = left * roots, roots[:, None] * right
    return up.contiguous(), down.contiguous(), float(sizes.double().square().sum())


def _report(energies: dict[str, tuple[float, float]], norms: int) -> Extracted:
    shares = {name: kept / whole for name, (whole, kept) in energies.items()}
    least = min(shares, key=lambda name: shares[name])
    whole, kept = (sum(each) for each in zip(*energies.values(), strict=True))
    return Extracted(len(energies), kept / whole, shares[least], least, norms)


def _require_same_shape(model: Checkpoint, base: Checkpoint) -> None:
    ours, theirs = ((x.width, x.double_blocks, x.single_blocks) for x in (model, base))
    if ours != theirs:
        raise ModelUnavailable(
            f"{model.name} has width {ours[0]} and {ours[1]}+{ours[2]} blocks, {base.name} "
            f"{theirs[0]} and {theirs[1]}+{theirs[2]}: both must be of one shape"
        )
