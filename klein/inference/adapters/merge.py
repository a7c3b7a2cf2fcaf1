"""Puts LoRAs on a transformer by adding them into its weights, and proves that they are there.

W = W₀ + Σ scaleᵢ · ΔWᵢ is computed from a pristine copy of W₀ with float32 sums and rounded once,
so a step costs what it costs without LoRAs, nothing drifts, nothing recompiles, and taking LoRAs
off is a copy: bit for bit the model as loaded. Every format ends in a ΔW, so all are served by the
same few lines.

A layer that acts through a float8 copy keeps W₀ where it is: W is quantised into the copy instead.
"""

import math
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

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
class AdapterRequest:
    """One LoRA to apply: its file, or why there is none."""

    path: str
    file: LoraFile | LoraError
    scale: float


@dataclass(frozen=True, slots=True)
class _Adapter:
    """A request whose file fits the model, and the file's tensors on the device."""

    file: LoraFile
    scale: float
    tensors: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class _Share:
    """What adapter number `adapter` adds to one linear: rows `rows` of a patch."""

    adapter: int
    patch: Patch
    rows: slice


@dataclass(slots=True)
class _Tally:
    """What one LoRA changed, layer by layer; tensors, so that nothing waits for the GPU."""

    changes: list[Tensor] = field(default_factory=list)
    strengths: list[float] = field(default_factory=list)


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
        self.switches = 0

    def check(self, file: LoraFile | LoraError) -> LoraFile:
        """`file`, if every layer of it is a layer of this model; else raises LoraError."""
        if isinstance(file, LoraError):
            raise file
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
        return file

    def has(self, requests: Sequence[AdapterRequest]) -> bool:
        """Whether exactly `requests` were applied last."""
        return self._active == _key(requests)

    @torch.no_grad()
    def apply(self, requests: Sequence[AdapterRequest]) -> list[LoraReport]:
        """Make `requests` active and nothing else; the report of each says what it did.

        One that has no file, does not fit or is not finite is left out, and its report has the
        error. Whatever interrupts it, the next call starts from the pristine weights.
        """
        started = time.perf_counter()
        if not self.has(requests):
            self._active = None
            self._reports = self._applied(requests)
            self._active = _key(requests)
            self.switches += 1
        seconds = round(time.perf_counter() - started, 4)
        named = zip(self._reports, requests, strict=True)
        return [replace(report, path=one.path, seconds=seconds) for report, one in named]

    def _applied(self, requests: Sequence[AdapterRequest]) -> list[LoraReport]:
        reports: dict[int, LoraReport] = {}
        adapters: dict[int, _Adapter] = {}
        for number, one in enumerate(requests):
            try:
                file = self.check(one.file)
                adapters[number] = _Adapter(file, one.scale, self._read(file))
            except LoraError as error:
                reports[number] = _failed(one, str(error))
        tallies = self._merge(list(adapters.values()))
        for (number, adapter), tally in zip(list(adapters.items()), tallies, strict=True):
            report = _report(requests[number].path, adapter, tally)
            if not math.isfinite(report.relative_change or 0.0):
                report = _failed(requests[number], _not_finite(adapter))
                del adapters[number]
            reports[number] = report
        if len(adapters) < len(tallies):
            self._merge(list(adapters.values()))
        return [reports[number] for number in range(len(requests))]

    def _merge(self, adapters: Sequence[_Adapter]) -> list[_Tally]:
        """Put W₀ + Σ scale · ΔW of `adapters` in place of what is there."""
        shares = self._shares(adapters)
        tallies = [_Tally() for _ in adapters]
        for name in sorted(self._changed | shares.keys()):
            self._changed.add(name)
            changes = self._merge_layer(name, shares.get(name, []), adapters)
            for share, change in zip(shares.get(name, []), changes, strict=True):
                tally, tensors = tallies[share.adapter], adapters[share.adapter].tensors
                tally.changes.append(change / self._norms[name])
                tally.strengths.append(strength_of(share.patch, parts_of(share.patch, tensors)))
        self._changed = set(shares)
        return tallies

    def _merge_layer(
        self, name: str, shares: Sequence[_Share], adapters: Sequence[_Adapter]
    ) -> list[Tensor]:
        """Write one layer's weight; returns |scale · ΔW| of each share."""
        original, layer = self._original(name), self._linears[name]
        target = torch.empty_like(original) if is_quantised(layer) else layer.weight
        scales = [adapters[share.adapter].scale for share in shares]
        parts = [parts_of(share.patch, adapters[share.adapter].tensors) for share in shares]
        if len(shares) == 1 and _is_plain(shares[0].patch, parts[0], target):
            up, down = parts[0]["up"][shares[0].rows], parts[0]["down"]
            by = scales[0] * strength_of(shares[0].patch, parts[0])
            torch.addmm(original, up, down, alpha=by, out=target)
            changes = [abs(by) * _product_norm(up, down)]
        else:
            deltas = [
                scale * delta(share.patch, part, original.float(), share.rows)
                for share, scale, part in zip(shares, scales, parts, strict=True)
            ]
            target.copy_(sum(deltas, original.float()) if deltas else original)
            changes = [change.norm() for change in deltas]
        if is_quantised(layer):
            quantise_weight(layer, target)
        return changes

    def _shares(self, adapters: Sequence[_Adapter]) -> dict[str, list[_Share]]:
        shares: dict[str, list[_Share]] = {}
        for number, one in enumerate(adapters):
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
        self._active, self._reports, self._changed = (), [], set()

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


def _key(requests: Sequence[AdapterRequest]) -> tuple[tuple[str, float], ...]:
    return tuple(
        (str(one.file) if isinstance(one.file, LoraError) else one.file.sha256, one.scale)
        for one in requests
    )


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


def _report(path: str, adapter: _Adapter, tally: _Tally) -> LoraReport:
    layers = len(adapter.file.patches)
    mean = sum(tally.strengths) / len(tally.strengths)
    return LoraReport(
        path=path,
        scale=adapter.scale,
        applied=True,
        sha256=adapter.file.sha256,
        format=adapter.file.format,
        rank=adapter.file.rank,
        layers_matched=layers,
        layers_in_file=layers,
        effective_scale=round(adapter.scale * mean, 6),
        relative_change=round(torch.stack(tally.changes).mean().item(), 8),
        trigger_words=adapter.file.trigger_words,
    )


def _failed(request: AdapterRequest, error: str) -> LoraReport:
    return LoraReport(request.path, request.scale, applied=False, error=error)


def _not_finite(adapter: _Adapter) -> str:
    """Which numbers of a LoRA are not finite, in words."""
    for name, tensor in adapter.tensors.items():
        if not tensor.isfinite().all():
            return f"LoRA {adapter.file.name!r} is damaged: {name[:90]!r} has NaN or infinity in it"
    return f"LoRA {adapter.file.name!r} cannot be applied: its weight changes are not finite"
