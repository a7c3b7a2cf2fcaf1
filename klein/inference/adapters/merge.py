"""Puts LoRAs on a transformer by adding them into its weights, and proves that they are there.

W = W₀ + Σ scaleᵢ · ΔWᵢ is computed from a pristine copy of W₀ with float32 sums and rounded once,
so a step costs what it costs without LoRAs, nothing drifts, nothing recompiles, and taking LoRAs
off is a copy: bit for bit the model as loaded. Every format ends in a ΔW, so all are served by the
same few lines.

A layer that acts through a float8 copy keeps W₀ where it is: W is quantised into the copy instead.
One that has no other weight than the float8 one keeps a copy of that: W₀ is what it stands for.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from klein.core import LoraReport
from klein.errors import LoraError, LoraUnavailable
from klein.inference.acceleration.ops import (
    acts_on,
    float8_copy,
    is_float8_only,
    is_quantised,
    quantise_weight,
)
from klein.inference.adapters import factors
from klein.inference.adapters.delta import delta, parts_of, strength_of
from klein.inference.adapters.factors import FactorCache, Factors, free_bytes
from klein.lora.file import LoraFile, Patch
from klein.lora.spec import BlockWeights, deciding
from klein.models.catalog import ModelSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AdapterRequest:
    """One LoRA to apply: its file, or why there is none."""

    path: str
    file: LoraFile | LoraError
    scale: float
    block_weights: BlockWeights = ()

    @property
    def key(self) -> tuple[object, ...]:
        """What its merge depends on."""
        known_by = str(self.file) if isinstance(self.file, LoraError) else self.file.sha256
        return known_by, self.scale, self.block_weights


@dataclass(frozen=True, slots=True)
class _Adapter:
    """A request whose file fits the model, and the file's tensors on the device."""

    file: LoraFile
    scale: float
    block_weights: BlockWeights
    tensors: Factors

    def weight_of(self, layer: str) -> float:
        """What the scale is multiplied by in a layer."""
        decided = deciding(self.block_weights, layer)
        return decided[1] if decided else 1.0

    def block_layers(self) -> dict[str, int]:
        """For how many of its layers each pattern decides."""
        counts = {pattern: 0 for pattern, _ in self.block_weights}
        for name in {name for patch in self.file.patches for name in patch.modules}:
            if decided := deciding(self.block_weights, name):
                counts[decided[0]] += 1
        return counts


@dataclass(frozen=True, slots=True)
class _Share:
    """What the adapter of request number `request` adds to one linear: rows `rows` of a patch of
    these `parts`, whose own `strength` is alpha / rank, times `scale`, which is the adapter's times
    `weight`."""

    request: int
    patch: Patch
    parts: Factors
    rows: slice
    scale: float
    weight: float
    strength: float


@dataclass(slots=True)
class _Tally:
    """What one LoRA changed, layer by layer; tensors, so that nothing waits for the GPU."""

    changes: list[Tensor] = field(default_factory=list)
    strengths: list[float] = field(default_factory=list)

    @property
    def mean_change(self) -> float:
        """Over the layers, |scale · ΔW| / |W|."""
        return torch.stack(self.changes).mean().item()


class _CannotMerge(Exception):
    """The adapter of request number `request` broke the merge, by `cause`."""

    def __init__(self, request: int, cause: Exception) -> None:
        super().__init__(request)
        self.request = request
        self.cause = cause


class LoraMerger:
    """The LoRAs on one transformer. Not thread-safe: one job at a time."""

    def __init__(
        self,
        transformer: torch.nn.Module,
        spec: ModelSpec,
        originals: Mapping[str, Tensor] | None = None,
        free: Callable[[torch.device], float] = free_bytes,
    ) -> None:
        """`originals` are the weights as loaded, by parameter name, where somebody keeps them;
        `free` gives the bytes of memory to be had on a device."""
        self._spec = spec
        self._layers: dict[str, Any] = {
            name: module
            for name, module in transformer.named_modules()
            if isinstance(module, torch.nn.Linear) or getattr(module, "weight", None) is not None
        }
        """Linears, and norms, whose weight is (n)."""
        self._pristine = {
            name: originals[f"{name}.weight"]
            for name in self._layers
            if originals and f"{name}.weight" in originals
        }
        self._rows = {
            name: (originals[f"{name}.float8"], originals[f"{name}.float8_scale"])
            for name in self._layers
            if originals and name not in self._pristine
        }
        """float8 values and scales as loaded, of the layers that have nothing else."""
        self._norms: dict[str, Tensor] = {}
        self._factors = FactorCache(free)
        self._float8 = any(map(is_quantised, self._layers.values()))
        """Whether layers are to act through their float8 copies, where they have them."""
        self._changed: set[tuple[str, bool]] = set()
        """Layers, and whether it is their float8 copies, in which something is merged."""
        self._active: tuple[object, ...] | None = (self._float8, ())
        self._reports: list[LoraReport] = []
        self.errors: list[LoraError] = []
        """Why LoRAs of the last `apply` were left out."""
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
            if why := self._misfit(patch):
                raise LoraError(
                    f"LoRA {file.name!r} does not fit {self._spec.name}: its layer "
                    f"{patch.layer!r} {why}"
                )
        return file

    def _misfit(self, patch: Patch) -> str | None:
        """Why a patch is for no layer of this model, or None."""
        rows, columns = 0, 0
        for name in patch.modules:
            if name not in self._layers:
                return "is missing there"
            rows_here, columns = (*self._layers[name].weight.shape, 1)[:2]
            if patch.shape[1] not in (0, columns) or (patch.kind == "oft" and columns % patch.rank):
                return "is of another width"
            rows += rows_here
        if patch.target.leading:
            rows = 3 * columns
        if patch.shape[0] not in (0, rows):
            return f"has {patch.shape[0]} rows, the model's has {rows}"
        return None

    def use(self, *, float8: bool) -> None:
        """Let layers that have both act through their float8 copies from the next `apply` on, or
        through their weights."""
        self._float8 = float8 and any(map(is_quantised, self._layers.values()))

    def has(self, requests: Sequence[AdapterRequest]) -> bool:
        """Whether exactly `requests` were applied last."""
        return self._active == self._key(requests)

    def _key(self, requests: Sequence[AdapterRequest]) -> tuple[object, ...]:
        return self._float8, tuple(one.key for one in requests)

    @torch.no_grad()
    def apply(
        self, requests: Sequence[AdapterRequest], *, last_try: bool = False
    ) -> list[LoraReport]:
        """Make `requests` active and nothing else; the report of each says what it did.

        One that cannot be had, does not fit, is not finite or fails in any other way is left out:
        `errors` says why. On the `last_try` running out of GPU memory is such a failure; before
        that it is raised, for the caller to make room. Whatever interrupts it, the next call starts
        from the pristine weights.
        """
        started = time.perf_counter()
        merges = int(not self.has(requests))
        if merges:
            self._active = None
            self._reports = self._applied(requests, last_try)
            self.switches += 1
            if not any(error.retryable for error in self.errors):
                self._active = self._key(requests)
        seconds = round(time.perf_counter() - started, 4)
        return [
            replace(report, path=one.path, merges=merges, seconds=seconds)
            for report, one in zip(self._reports, requests, strict=True)
        ]

    def _applied(self, requests: Sequence[AdapterRequest], last_try: bool) -> list[LoraReport]:
        adapters: dict[int, _Adapter] = {}
        errors: dict[int, LoraError] = {}
        in_use = {one.file.sha256 for one in requests if isinstance(one.file, LoraFile)}
        device = acts_on(next(iter(self._layers.values())))
        for number, one in enumerate(requests):
            try:
                file = self.check(one.file)
                tensors = self._factors.get(file, device, in_use)
                factors.require_no_biases(file, tensors)
                adapters[number] = _Adapter(file, one.scale, one.block_weights, tensors)
            except Exception as error:
                errors[number] = _lora_error(error, one, last_try)
        while True:  # until all that are left are merged
            before = len(adapters)
            try:
                merged = self._merge(adapters)
            except _CannotMerge as error:
                del adapters[error.request]
                errors[error.request] = _lora_error(error.cause, requests[error.request], last_try)
                continue
            for number in [n for n, one in merged.items() if not math.isfinite(one.mean_change)]:
                errors[number] = _not_finite(adapters.pop(number))
            if len(adapters) == before:
                break
        self.errors = [errors[number] for number in sorted(errors)]
        return [
            LoraReport(one.path, one.scale, applied=False, error=str(errors[number]))
            if number in errors
            else _report(one.path, adapters[number], merged[number], self._merged_into())
            for number, one in enumerate(requests)
        ]

    def _merge(self, adapters: Mapping[int, _Adapter]) -> dict[int, _Tally]:
        """Put W₀ + Σ scale · ΔW of `adapters`, by their requests' numbers, in place of what is
        there; raises _CannotMerge."""
        shares = self._shares(adapters)
        tallies = {number: _Tally() for number in adapters}
        places = {name: (name, self._into_copy(name)) for name in self._layers}
        changed = {name for name, place in places.items() if place in self._changed}
        for name in sorted(changed | shares.keys()):
            self._changed.add(places[name])
            here = shares.get(name, [])
            for share, change in zip(here, self._merge_layer(name, here), strict=True):
                tallies[share.request].changes.append(change / self._norms[name])
                tallies[share.request].strengths.append(share.strength * share.weight)
        self._changed -= {places[name] for name in changed - shares.keys()}
        return tallies

    def _into_copy(self, name: str) -> bool:
        """Whether a layer's float8 copy is what changes."""
        layer = self._layers[name]
        return is_float8_only(layer) or (self._float8 and is_quantised(layer))

    def _merge_layer(self, name: str, shares: Sequence[_Share]) -> list[Tensor]:
        """Write one layer's weight; returns |scale · ΔW| of each share."""
        layer, into_copy = self._layers[name], self._into_copy(name)
        if is_float8_only(layer) and not shares:
            for kept, original in zip(float8_copy(layer), self._rows[name], strict=True):
                kept.copy_(original)
            return []
        original = self._original(name)
        target = torch.empty_like(original) if into_copy else layer.weight
        if len(shares) == 1 and _is_plain(shares[0], target):
            changes = [_put(shares[0], original, target)]
        else:
            total, changes = original, []
            for share in shares:
                with _blaming(share.request):
                    whole = original.float()
                    change = share.scale * delta(share.patch, share.parts, whole, share.rows)
                    total = total + change
                    changes.append(change.norm())
            target.copy_(total)
        if is_float8_only(layer) and not any(share.scale for share in shares):
            self._merge_layer(name, [])
        elif into_copy:
            quantise_weight(layer, target)
        return changes

    def _shares(self, adapters: Mapping[int, _Adapter]) -> dict[str, list[_Share]]:
        shares: dict[str, list[_Share]] = {}
        for number, one in adapters.items():
            for patch in one.file.patches:
                with _blaming(number):
                    parts = parts_of(patch, one.tensors)
                    strength = strength_of(patch, parts)
                start = 0
                for name in patch.modules:
                    rows = slice(start, start + len(self._layers[name].weight))
                    weight = one.weight_of(name)
                    scale = one.scale * weight
                    share = _Share(number, patch, parts, rows, scale, weight, strength)
                    shares.setdefault(name, []).append(share)
                    start = rows.stop
        return shares

    def _original(self, name: str) -> Tensor:
        """The weight as loaded, on the device it acts on; copied when a LoRA first touches it.

        The copies stay on the GPU if they fit there beside a picture, else in main memory.
        """
        layer = self._layers[name]
        weight = self._dequantised(name) if is_float8_only(layer) else layer.weight
        if name in self._pristine:
            weight = self._pristine[name]
        weight = weight.to(acts_on(layer), non_blocking=True)
        if name not in self._norms:
            norm = torch.linalg.vector_norm(weight, dtype=torch.float32).clamp_min(1e-12)
            self._norms[name] = norm
        if name in self._pristine or self._into_copy(name):
            return weight
        copy = weight.detach().clone()
        self._pristine[name] = copy if self._room_for_copies(weight) else copy.cpu()
        return copy

    def _dequantised(self, name: str) -> Tensor:
        """W₀ in float32 of a layer that has only a float8 weight, which is copied first."""
        rows = float8_copy(self._layers[name])
        if name not in self._rows:
            at_hand = self._room_for_copies(rows[0])
            values, scale = (x.clone() if at_hand else x.cpu() for x in rows)
            self._rows[name] = values, scale
        values, scale = (x.to(rows[0].device) for x in self._rows[name])
        return values.float() * scale.t()

    def forget(self) -> None:
        """The transformer's weights are those loaded again: somebody put them back."""
        self._active, self._reports, self._changed = self._key(()), [], set()
        self.errors = []

    def spare_bytes(self) -> int:
        """GPU memory that `release` would give back."""
        return self._factors.nbytes() + sum(copy.nbytes for copy in self._copies() if copy.is_cuda)

    def release(self) -> None:
        """Give back the GPU memory that only makes switching quicker."""
        self._factors.clear()
        self._pristine = {name: copy.cpu() for name, copy in self._pristine.items()}
        self._rows = {name: (a.cpu(), b.cpu()) for name, (a, b) in self._rows.items()}

    def _copies(self) -> list[Tensor]:
        return [*self._pristine.values(), *(x for rows in self._rows.values() for x in rows)]

    def _room_for_copies(self, weight: Tensor) -> bool:
        if not weight.is_cuda:
            return True
        spare = 6 * 1024**3
        held = sum(copy.nbytes for copy in self._copies() if copy.is_cuda)
        wanted: int = sum(
            layer.weight.numel() if is_float8_only(layer) else layer.weight.nbytes
            for name, layer in self._layers.items()
            if is_float8_only(layer) or not self._into_copy(name)
        )
        return torch.cuda.mem_get_info()[0] > wanted - held + spare

    def _merged_into(self) -> str:
        """What W₀ is, in words for a report."""
        layers = self._layers.values()
        if any(map(is_float8_only, layers)):
            return "float8"
        dtype: torch.dtype = next(iter(layers)).weight.dtype
        return str(dtype).removeprefix("torch.")


def _is_plain(share: _Share, target: Tensor) -> bool:
    """Whether one matrix product with float32 sums gives the rounded result at once."""
    layer = share.patch.target
    if share.patch.kind != "lora" or layer.swapped_halves or layer.leading or target.ndim != 2:
        return False
    return share.parts["up"].dtype == share.parts["down"].dtype == target.dtype


@contextmanager
def _blaming(request: int) -> Iterator[None]:
    """What breaks inside is the fault of the LoRA of request number `request`."""
    try:
        yield
    except Exception as error:
        raise _CannotMerge(request, error) from error


def _put(share: _Share, original: Tensor, target: Tensor) -> Tensor:
    """Write W₀ + scale · ΔW of a plain LoRA; returns |scale · ΔW|."""
    with _blaming(share.request):
        up, down = share.parts["up"][share.rows], share.parts["down"]
        by = share.scale * share.strength
        torch.addmm(original, up, down, alpha=by, out=target)
        return abs(by) * _product_norm(up, down)


def _product_norm(up: Tensor, down: Tensor) -> Tensor:
    """|up · down| (Frobenius), from two rank × rank products where those are smaller."""
    up, down = up.float(), down.float()
    if len(down) > min(len(up), down.shape[1]):
        norm: Tensor = torch.linalg.vector_norm(up @ down)
        return norm
    return ((up.T @ up) * (down @ down.T)).sum().clamp_min(0).sqrt()


def _report(path: str, adapter: _Adapter, tally: _Tally, merged_into: str) -> LoraReport:
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
        relative_change=round(tally.mean_change, 8),
        trigger_words=adapter.file.trigger_words,
        merged_into=merged_into,
        block_layers=adapter.block_layers(),
    )


def _lora_error(error: Exception, request: AdapterRequest, last_try: bool) -> LoraError:
    """What to say of a LoRA that failed by `error`; a new one, since a traceback would keep the
    tensors of its frames. Raises `error` where memory ran out and it was not the last try."""
    if isinstance(error, LoraError):
        return type(error)(str(error), field=error.field)
    if isinstance(error, torch.OutOfMemoryError):
        if not last_try:
            raise error
        return LoraUnavailable(
            f"LoRA {request.path!r} did not fit into GPU memory, twice: use fewer LoRAs at once, "
            "one of a lower rank, or start klein with KLEIN_OFFLOAD=model"
        )
    log.error("LoRA %s failed", request.path, exc_info=error)
    return LoraError(
        f"LoRA {request.path!r} could not be applied, by a fault of klein ({type(error).__name__})"
    )


def _not_finite(adapter: _Adapter) -> LoraError:
    """Which numbers of a LoRA are not finite, in words."""
    name = adapter.file.name
    for tensor, values in adapter.tensors.items():
        if not values.float().isfinite().all():  # float8 does not know by itself
            return LoraError(f"LoRA {name!r} is damaged: {tensor[:90]!r} has NaN or infinity in it")
    return LoraError(f"LoRA {name!r} cannot be applied: its weight changes are not finite")
