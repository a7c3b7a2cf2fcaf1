"""Puts LoRAs on a transformer by adding them into its weights, and proves that they are there.

W = W₀ + Σ scaleᵢ · ΔWᵢ is computed from a pristine copy of W₀ with float32 sums and rounded once,
so a step costs what it costs without LoRAs, nothing drifts, nothing recompiles, and taking LoRAs
off is a copy: bit for bit the model as loaded. Every format ends in a ΔW, so all are served by the
same few lines.

A layer that acts through a float8 copy keeps W₀ where it is: W is quantised into the copy instead.
"""

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from safetensors.torch import load_file
from torch import Tensor

from klein.core import LoraReport
from klein.errors import LoraError
from klein.inference.acceleration.ops import acts_on, is_quantised, quantise_weight
from klein.inference.adapters.delta import delta, parts_of, strength_of
from klein.lora.file import LoraFile, Patch
from klein.models.catalog import ModelSpec

FACTOR_BYTES = 2 * 1024**3
"""Of recently used LoRAs kept on the device, so that their second use reads no file."""


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


@dataclass(slots=True)
class _Tally:
    """What one LoRA changed, layer by layer; tensors, so that nothing waits for the GPU."""

    changes: list[Tensor]
    strengths: list[float]


class LoraMerger:
    """The LoRAs on one transformer. Not thread-safe: one job at a time."""

    def __init__(
        self,
        transformer: torch.nn.Module,
        spec: ModelSpec,
        originals: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`originals` are the weights as loaded, by parameter name, where somebody keeps them."""
        self._spec = spec
        self._linears = {
            name: module
            for name, module in transformer.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        self._pristine = {name: originals[f"{name}.weight"] for name in self._linears if originals}
        self._norms: dict[str, Tensor] = {}
        self._factors: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._changed: set[str] = set()
        self._active: tuple[tuple[str, float], ...] | None = ()
        self._reports: list[LoraReport] = []

    def check(self, file: LoraFile) -> None:
        """Raise LoraError unless every layer of `file` is a layer of this model."""
        if file.hidden not in (None, self._spec.hidden):
            raise LoraError(
                f"LoRA {file.name!r} was trained for {file.base}, and the loaded model is "
                f"{self._spec.name} (width {self._spec.hidden})"
            )
        for patch in file.patches:
            rows = 0
            for name in patch.modules:
                linear = self._linears.get(name)
                if linear is None or linear.in_features != patch.shape[1]:
                    why = "missing there" if linear is None else "of another width"
                    raise LoraError(
                        f"LoRA {file.name!r} does not fit {self._spec.name}: its layer "
                        f"{patch.layer!r} is {why}"
                    )
                rows += linear.out_features
            if rows != patch.shape[0]:
                raise LoraError(
                    f"LoRA {file.name!r} does not fit {self._spec.name}: its layer "
                    f"{patch.layer!r} has {patch.shape[0]} rows, the model's has {rows}"
                )

    def has(self, wanted: Sequence[Wanted]) -> bool:
        """Whether exactly `wanted` is active already."""
        return self._active == _key(wanted)

    @torch.no_grad()
    def apply(self, wanted: Sequence[Wanted]) -> list[LoraReport]:
        """Make exactly `wanted` active; each must have passed `check`. Returns their reports.

        Whatever interrupts it, the next call starts from the pristine weights.
        """
        started = time.perf_counter()
        if not self.has(wanted):
            self._active = None
            self._reports = self._merge(wanted)
            self._active = _key(wanted)
        seconds = round(time.perf_counter() - started, 4)
        named = zip(self._reports, wanted, strict=True)
        return [replace(report, path=one.path, seconds=seconds) for report, one in named]

    def _merge(self, wanted: Sequence[Wanted]) -> list[LoraReport]:
        shares = self._shares(wanted)
        factors = [self._read(one.file) for one in wanted]
        tallies = [_Tally([], []) for _ in wanted]
        for name in sorted(self._changed | shares.keys()):
            original = self._original(name)
            self._changed.add(name)
            layer = self._linears[name]
            target = torch.empty_like(original) if is_quantised(layer) else layer.weight
            mine = shares.get(name, [])
            scales = [wanted[share.lora].scale for share in mine]
            parts = [parts_of(share.patch, factors[share.lora]) for share in mine]
            if len(mine) == 1 and _is_plain(mine[0].patch, parts[0], target):
                share, part = mine[0], parts[0]
                by = scales[0] * strength_of(share.patch, part)
                torch.addmm(original, part["up"][share.rows], part["down"], alpha=by, out=target)
                changes = [abs(by) * _product_norm(part["up"][share.rows], part["down"])]
            else:
                deltas = [
                    scale * delta(share.patch, part, original.float(), share.rows)
                    for share, scale, part in zip(mine, scales, parts, strict=True)
                ]
                target.copy_(sum(deltas, original.float()) if deltas else original)
                changes = [change.norm() for change in deltas]
            if is_quantised(layer):
                quantise_weight(layer, target)
            for share, part, change in zip(mine, parts, changes, strict=True):
                tallies[share.lora].changes.append(change / self._norms[name])
                tallies[share.lora].strengths.append(strength_of(share.patch, part))
        self._changed = set(shares)
        return [_report(one, tally) for one, tally in zip(wanted, tallies, strict=True)]

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
        """The weight as loaded, on the device it acts on; copied when a LoRA first touches it.

        The copies stay on the GPU if they fit there beside a picture, else in main memory.
        """
        layer = self._linears[name]
        weight = layer.weight
        if is_quantised(layer):
            weight = weight.to(acts_on(layer))
        if name not in self._norms:
            norm = torch.linalg.vector_norm(weight, dtype=torch.float32).clamp_min(1e-12)
            self._norms[name] = norm
        if is_quantised(layer):
            return weight
        if name not in self._pristine:
            copy = weight.detach().clone()
            self._pristine[name] = copy if self._room_for_copies(weight) else copy.cpu()
        return self._pristine[name].to(weight.device, non_blocking=True)

    def forget(self) -> None:
        """The transformer's weights are those loaded again: somebody put them back."""
        self._active, self._changed = (), set()

    def spare_bytes(self) -> int:
        """GPU memory that `release` would give back."""
        return self._held() + sum(w.nbytes for w in self._pristine.values() if w.is_cuda)

    def release(self) -> None:
        """Give back the GPU memory that only makes switching quicker."""
        self._factors.clear()
        self._pristine = {name: copy.cpu() for name, copy in self._pristine.items()}

    def _room_for_copies(self, weight: Tensor) -> bool:
        if not weight.is_cuda:
            return True
        spare = 6 * 1024**3
        held = sum(w.nbytes for w in self._pristine.values() if w.is_cuda)
        copied = [layer for layer in self._linears.values() if not is_quantised(layer)]
        wanted = sum(layer.weight.nbytes for layer in copied)
        return torch.cuda.mem_get_info()[0] > wanted - held + spare

    def _read(self, file: LoraFile) -> dict[str, Tensor]:
        """The file's tensors on the device, kept for its next use."""
        if file.sha256 not in self._factors:
            device = acts_on(next(iter(self._linears.values())))
            self._factors[file.sha256] = load_file(file.path, device=str(device))
        self._factors.move_to_end(file.sha256)
        while len(self._factors) > 1 and self._held() > FACTOR_BYTES:
            self._factors.popitem(last=False)
        return self._factors[file.sha256]

    def _held(self) -> int:
        """Bytes of factors on the GPU, or where there is none in main memory."""
        return sum(t.nbytes for tensors in self._factors.values() for t in tensors.values())


def _key(wanted: Sequence[Wanted]) -> tuple[tuple[str, float], ...]:
    return tuple((one.file.sha256, one.scale) for one in wanted)


def _is_plain(patch: Patch, parts: Mapping[str, Tensor], target: Tensor) -> bool:
    """Whether one matrix product with float32 sums gives the rounded result at once."""
    return (
        patch.kind == "lora"
        and not patch.swapped_halves
        and parts["up"].dtype == parts["down"].dtype == target.dtype
    )


def _product_norm(up: Tensor, down: Tensor) -> Tensor:
    """|up · down| (Frobenius) from two rank × rank products instead of the whole."""
    up, down = up.float(), down.float()
    return ((up.T @ up) * (down @ down.T)).sum().clamp_min(0).sqrt()


def _report(one: Wanted, tally: _Tally) -> LoraReport:
    layers = len(one.file.patches)
    mean = sum(tally.strengths) / len(tally.strengths)
    return LoraReport(
        path=one.path,
        scale=one.scale,
        applied=True,
        sha256=one.file.sha256,
        format=one.file.format,
        rank=one.file.rank,
        layers_matched=layers,
        layers_in_file=layers,
        effective_scale=round(one.scale * mean, 6),
        relative_change=round(torch.stack(tally.changes).mean().item(), 8),
        trigger_words=one.file.trigger_words,
    )
