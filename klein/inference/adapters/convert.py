"""Writes any LoRA that klein reads as a clean file in diffusers' format, for other programs."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from klein.errors import LoraError
from klein.inference.adapters import factors
from klein.inference.adapters.delta import delta
from klein.lora.file import LoraFile, Patch
from klein.sources import safetensors

MOST_RANK = 256
KEPT = ("ss_base_model_version", "ss_tag_frequency", "name", "training_info")
"""Metadata worth carrying over."""


def convert(found: LoraFile, target: Path) -> int:
    """Write `found` to `target`; returns the largest rank in it.

    LoRAs keep their factors, with alpha / rank multiplied into the second. LoHa, LoKr and full
    changes become the fewest factors that reproduce them to 1e-5. Raises LoraError for a DoRA,
    which depends on the weights it is put on, and for what needs a rank above 256.
    """
    stored = factors.read(found, torch.device("cpu"))
    tensors: dict[str, Tensor] = {}
    for patch in found.patches:
        up, down = _factors(found.name, patch, stored)
        start = 0
        share = up.shape[0] // len(patch.modules)
        for module in patch.modules:
            tensors[f"transformer.{module}.lora_A.weight"] = down.clone()
            tensors[f"transformer.{module}.lora_B.weight"] = up[start : start + share].contiguous()
            start += share
    with found.path.open("rb") as file:
        metadata = safetensors.read(file).metadata
    save_file(tensors, target, {"format": "pt", **{k: metadata[k] for k in KEPT if k in metadata}})
    return max(tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name)


def _factors(name: str, patch: Patch, stored: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(out, rank) and (rank, in) whose product is the patch's ΔW."""
    parts = {part: stored[tensor] for part, tensor in patch.tensors.items()}
    if patch.kind == "dora":
        raise LoraError(
            f"LoRA {name!r} is a DoRA: what it does depends on the weights it is put on, "
            "so only klein and programs that know DoRA can apply it"
        )
    if patch.kind == "lora" and not patch.swapped_halves:
        alpha = parts.get("alpha")
        strength = 1.0 if alpha is None else float(alpha) / patch.rank
        up = parts["up"]
        return (up.float() * strength).to(up.dtype), parts["down"]
    whole = delta(patch, parts, torch.zeros(patch.shape), slice(None))
    left, sizes, right = torch.linalg.svd(whole, full_matrices=False)
    rank = max(1, int((sizes > sizes[0] * 1e-5).sum()))
    if rank > MOST_RANK:
        raise LoraError(
            f"LoRA {name!r}: layer {patch.layer!r} would need rank {rank}, {MOST_RANK} is the "
            "most; klein applies the file as it is"
        )
    roots = sizes[:rank].sqrt()
    return (left[:, :rank] * roots).contiguous(), (roots[:, None] * right[:rank]).contiguous()
