"""Puts LoRAs on a transformer by adding them into its weights, and proves that they are there.

W = W₀ + Σ scaleᵢ · ΔWᵢ is computed in float32 from a pristine copy of W₀ and rounded once, so
pictures cost nothing extra, nothing drifts, and taking LoRAs off is a copy: bit for bit the model
as loaded. Every format ends in a ΔW, so all of them are served by the same few lines.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from safetensors import safe_open
from torch import Tensor

from klein.core import LoraReport
from klein.errors import LoraError
from klein.lora.file import LoraFile, Patch
from klein.models import MODELS, ModelSpec

_OTHER_WIDTHS = {6144: "FLUX.2-dev"}


@dataclass(frozen=True, slots=True)
class Wanted:
    """One LoRA to apply."""

    path: str
    file: LoraFile
    scale: float


@dataclass(frozen=True, slots=True)
class _Share:
    """What LoRA number `lora` adds to one linear: rows `rows` of a patch."""

    lora: int
    patch: Patch
    rows: slice


class LoraMerger:
    """The LoRAs on one transformer. Not thread-safe: one job at a time."""

    def __init__(self, transformer: torch.nn.Module, spec: ModelSpec) -> None:
        self._spec = spec
        self._linears = {
            name: module
            for name, module in transformer.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        self._pristine: dict[str, Tensor] = {}
        self._changed: set[str] = set()
        self._active: tuple[tuple[str, float], ...] | None = ()
        self._reports: list[LoraReport] = []

    def check(self, file: LoraFile) -> None:
        """Raise LoraError unless every layer of `file` is a layer of this model."""
        if file.hidden not in (None, self._spec.hidden):
            raise LoraError(
                f"LoRA {file.name!r} was trained for {_model_of(file.hidden)}, and the loaded "
                f"model is {self._spec.name} (width {self._spec.hidden})"
            )
        for patch in file.patches:
            rows = 0
            for name in patch.modules:
                linear = self._linears.get(name)
                if linear is None or linear.in_features != patch.shape[1]:
                    raise LoraError(
                        f"LoRA {file.name!r} does not fit {self._spec.name}: its layer "
                        f"{patch.layer!r} is {'missing there' if linear is None else 'wider'}"
                    )
                rows += linear.out_features
            if rows != patch.shape[0]:
                raise LoraError(
                    f"LoRA {file.name!r} does not fit {self._spec.name}: its layer "
                    f"{patch.layer!r} has {patch.shape[0]} rows, the model's has {rows}"
                )

    @torch.no_grad()
    def apply(self, wanted: Sequence[Wanted]) -> list[LoraReport]:
        """Make exactly `wanted` active; each must have passed `check`. Returns their reports.

        Whatever interrupts it, the next call starts from the pristine weights.
        """
        key = tuple((one.file.sha256, one.scale) for one in wanted)
        if key != self._active:
            self._active = None
            self._reports = self._merge(wanted)
            self._active = key
        return list(self._reports)

    def _merge(self, wanted: Sequence[Wanted]) -> list[LoraReport]:
        shares = self._shares(wanted)
        changes: list[list[Tensor]] = [[] for _ in wanted]
        with ExitStack() as files:
            device = str(next(iter(self._linears.values())).weight.device)
            readers = [
                files.enter_context(safe_open(str(one.file.path), framework="pt", device=device))
                for one in wanted
            ]
            for name in sorted(self._changed | shares.keys()):
                weight = self._original(name)
                self._changed.add(name)
                total = original = weight.float()
                for share in shares.get(name, ()):
                    get = readers[share.lora].get_tensor
                    parts = {part: get(key).float() for part, key in share.patch.tensors.items()}
                    scale = wanted[share.lora].scale
                    change = scale * delta(share.patch, parts, original, share.rows)
                    total = total + change
                    changes[share.lora].append(change.norm() / original.norm().clamp_min(1e-12))
                self._linears[name].weight.copy_(total if name in shares else weight)
        self._changed = set(shares)
        return [_report(one, found) for one, found in zip(wanted, changes, strict=True)]

    def _shares(self, wanted: Sequence[Wanted]) -> dict[str, list[_Share]]:
        shares: dict[str, list[_Share]] = {}
        for number, one in enumerate(wanted):
            for patch in one.file.patches:
                start = 0
                for name in patch.modules:
                    rows = slice(start, start + self._linears[name].out_features)
                    shares.setdefault(name, []).append(_Share(number, patch, rows))
                    start = rows.stop
        return shares

    def _original(self, name: str) -> Tensor:
        """The weight as loaded. Its copy is made when a LoRA first touches it."""
        if name not in self._pristine:
            self._pristine[name] = self._linears[name].weight.detach().clone()
        return self._pristine[name]


def delta(patch: Patch, parts: dict[str, Tensor], original: Tensor, rows: slice) -> Tensor:
    """Rows `rows` of ΔW at scale 1, float32, of shape (rows, in).

    `parts` are the patch's tensors in float32, `original` the weight W₀ of those rows (for DoRA,
    which rescales whole rows). Sources: LoRA (Hu 2021), LoHa and LoKr (LyCORIS), DoRA (Liu 2024).
    """
    strength = float(parts["alpha"]) / patch.rank if "alpha" in parts and patch.rank else 1.0
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


def _report(one: Wanted, changes: list[Tensor]) -> LoraReport:
    layers = len(one.file.patches)
    return LoraReport(
        path=one.path,
        scale=one.scale,
        applied=True,
        sha256=one.file.sha256,
        format=one.file.format,
        rank=one.file.rank,
        layers_matched=layers,
        layers_in_file=layers,
        relative_change=round(torch.stack(changes).mean().item(), 8),
        trigger_words=one.file.trigger_words,
    )


def _factor(part: str, parts: dict[str, Tensor]) -> Tensor:
    return parts[part] if part in parts else parts[f"{part}_a"] @ parts[f"{part}_b"]


def _model_of(hidden: int | None) -> str:
    names = [spec.name for spec in MODELS.values() if spec.hidden == hidden]
    name = " or ".join(names) or _OTHER_WIDTHS.get(hidden or 0, "another model")
    return f"{name} (width {hidden})"
