"""The change of weight that each kind of LoRA stands for."""

from collections.abc import Mapping

import torch
from torch import Tensor

from klein.lora.file import Patch


def delta(patch: Patch, stored: Mapping[str, Tensor], original: Tensor, rows: slice) -> Tensor:
    """Rows `rows` of ΔW at scale 1, float32, of shape (rows, in).

    `stored` are the patch's tensors, `original` the float32 weight W₀ of those rows (for DoRA,
    which rescales whole rows). Sources: LoRA (Hu 2021), LoHa and LoKr (LyCORIS), DoRA (Liu 2024).
    """
    strength = strength_of(patch, stored)
    parts = {part: tensor.float() for part, tensor in stored.items()}
    if patch.swapped_halves:
        parts = {k: torch.cat(v.chunk(2)[::-1]) if k in _BY_ROWS else v for k, v in parts.items()}
    match patch.kind:
        case "diff":
            change = parts["diff"][rows]
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
    """alpha / rank; 1 without alpha, and for a LoKr of two whole factors, which has no rank."""
    return float(parts["alpha"]) / patch.rank if "alpha" in parts and patch.rank else 1.0


def _factor(part: str, parts: dict[str, Tensor]) -> Tensor:
    return parts[part] if part in parts else parts[f"{part}_a"] @ parts[f"{part}_b"]
