"""The change of weight that each kind of LoRA stands for."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from klein.lora.file import Patch


def delta(patch: Patch, stored: Mapping[str, Tensor], original: Tensor, rows: slice) -> Tensor:
    """Rows `rows` of ΔW at scale 1, float32, in the shape of `original`.

    `stored` are the patch's tensors, `original` the float32 weight W₀ of those rows (for DoRA and
    OFT, which turn what is there). Sources: LoRA (Hu 2021), LoHa and LoKr (LyCORIS), DoRA (Liu
    2024), OFT (Qiu 2023).
    """
    if not patch.target.leading:
        return _delta(patch, stored, original, rows).reshape(original.shape)
    whole, stop = torch.zeros_like(original), 3 * original.shape[1]
    whole[:stop] = _delta(patch, stored, original[:stop], rows)
    return whole


def _delta(patch: Patch, stored: Mapping[str, Tensor], original: Tensor, rows: slice) -> Tensor:
    strength = strength_of(patch, stored)
    parts = {part: tensor.float() for part, tensor in stored.items()}
    if patch.target.swapped_halves:
        parts = {k: torch.cat(v.chunk(2)[::-1]) if k in _BY_ROWS else v for k, v in parts.items()}
    match patch.kind:
        case "diff":
            change = parts["diff"].reshape(patch.shape)[rows]
        case "oft":
            blocks = original.view(len(original), -1, patch.rank)
            turned = torch.einsum("rkb,kcb->rkc", blocks, _rotations(parts, blocks.shape[1]))
            change = (turned - blocks).reshape(original.shape)
        case "loha":
            left = parts["hada_w1_a"][rows] @ parts["hada_w1_b"]
            change = strength * left * (parts["hada_w2_a"][rows] @ parts["hada_w2_b"])
        case "lokr":
            left, right = _factor("lokr_w1", parts), _factor("lokr_w2", parts)
            change = strength * torch.kron(left.contiguous(), right.contiguous())[rows]
        case _:
            change = strength * (parts["up"][rows] @ parts["down"])
    if patch.kind == "dora":
        merged = original + change
        magnitude = parts["magnitude"].flatten()[rows].unsqueeze(1)
        change = magnitude * merged / merged.norm(dim=1, keepdim=True) - original
    return change


_BY_ROWS = ("up", "diff", "magnitude", "hada_w1_a", "hada_w2_a")
"""Parts whose first axis is the layer's output."""


def parts_of(patch: Patch, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The patch's tensors by part, out of those of its file."""
    return {part: tensors[name] for part, name in patch.tensors.items()}


def strength_of(patch: Patch, parts: Mapping[str, Tensor]) -> float:
    """alpha / rank; 1 without alpha, for an OFT, and for a LoKr of two whole factors, which has no
    rank."""
    scaled = "alpha" in parts and patch.rank and patch.kind != "oft"
    return float(parts["alpha"]) / patch.rank if scaled else 1.0


def _rotations(parts: Mapping[str, Tensor], blocks: int) -> Tensor:
    """The rotation of each block of inputs (blocks, b, b) of an OFT: Cayley's transform of a skew
    matrix Q as its trainers compute it, (I + Q)(I - Q)⁻¹ ≈ I + 2Q + 2Q² + 2Q³ + Q⁴."""
    upper = parts["oft"]
    if "scaled_oft" in parts:
        upper = upper / upper.shape[1] ** 0.5
    side = (1 + math.isqrt(1 + 8 * upper.shape[1])) // 2
    skew = upper.new_zeros(len(upper), side, side)
    rows, columns = torch.triu_indices(side, side, 1, device=upper.device)
    skew[:, rows, columns] = upper
    skew = skew - skew.transpose(1, 2)
    square = skew @ skew
    turned = torch.eye(side, device=upper.device) + 2 * skew + 2 * square
    return (turned + 2 * square @ skew + square @ square).expand(blocks, -1, -1)


def _factor(part: str, parts: dict[str, Tensor]) -> Tensor:
    return parts[part] if part in parts else parts[f"{part}_a"] @ parts[f"{part}_b"]
