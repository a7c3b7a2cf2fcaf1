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
ON_WEIGHTS = {"dora": "a DoRA", "oft": "an OFT"}
"""Kinds whose ΔW is another for other weights."""


def convert(found: LoraFile, target: Path) -> int:
    """Write `found` to `target`; returns the largest rank in it.

    LoRAs keep their factors, with alpha / rank multiplied into the second. LoHa, LoKr and full
    changes become the fewest factors that reproduce them to 1e-5. Raises LoraError for a DoRA or
    OFT, which depend on the weights they are put on, for a change of norms, and for what needs a
    rank above 256.
    """
    stored = factors.read(found, torch.device("cpu"))
    factors.require_no_biases(found, stored)
    tensors: dict[str, Tensor] = {}
    for patch in found.patches:
        up, down = _factors(found.name, patch, stored)
        if patch.target.leading:  # q, k and v, before the two halves of the MLP
            up = torch.cat([up, up.new_zeros(2 * len(up), up.shape[1])])
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
    if kind := ON_WEIGHTS.get(patch.kind):
        raise LoraError(
            f"LoRA {name!r} is {kind}: what it does depends on the weights it is put on, so only "
            "klein and programs that know such files can apply it"
        )
    if patch.shape[1] == 1:
        raise LoraError(
            f"LoRA {name!r} changes the norm {patch.layer!r}, which diffusers' format cannot say; "
            "klein applies the file as it is"
        )
    if patch.kind == "lora" and not patch.target.swapped_halves:
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
