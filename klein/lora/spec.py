"""One LoRA of a request, as the request names it: which file, how strongly, when and where."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise

SCALE_RANGE = (-4.0, 4.0)
"""Of a request's scale, of each piece of one and of each block weight, and of the one kept beside a
file."""
MAX_POINTS = 8
"""Of a scale over the run: each may cost a merge an image."""
MAX_BLOCK_WEIGHTS = 64
MAX_PATTERN = 100
"""Characters of a pattern of layer names."""

Curve = tuple[tuple[float, float], ...]
"""A scale over the run: (fraction of the run's steps, scale from there on), fractions rising from
0 to below 1."""
Scale = float | Curve
BlockWeights = tuple[tuple[str, float], ...]
"""Patterns of layer names as in a shell, `*` for anything, and what the scale is multiplied by
there. A pattern that names a block is for all of it; of several that match, the last decides."""


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """One LoRA of a request. `scale` 1.0 is as trained, None the file's own default;
    `trigger` "auto" puts a missing trigger word in front of the prompt."""

    path: str
    scale: Scale | None = None
    weight_name: str | None = None
    revision: str | None = None
    trigger: str = "off"
    block_weights: BlockWeights = ()


def fault(points: Sequence[tuple[float, float]]) -> str | None:
    """Why `points` are no Curve, in words that follow "a scale over the run", or None."""
    low, high = SCALE_RANGE
    fractions = [fraction for fraction, _ in points]
    if not 1 <= len(points) <= MAX_POINTS:
        return f"has 1 to {MAX_POINTS} points, not {len(points)}"
    if fractions[0] != 0:
        return "begins with the fraction 0"
    if not all(0 <= fraction < 1 for fraction in fractions):
        return "has fractions of the run from 0 to below 1"
    if not all(before < after for before, after in pairwise(fractions)):
        return "has fractions that rise from point to point"
    if not all(low <= scale <= high for _, scale in points):
        return f"has scales from {low:g} to {high:g}"
    return None


def scale_at(scale: Scale, step: int, steps: int) -> float:
    """The scale in step `step`, from 0, of `steps`: that of the last point at or before it."""
    if not isinstance(scale, tuple):
        return scale
    return [value for fraction, value in scale if _begins(fraction, steps) <= step][-1]


def changes(scales: Iterable[Scale], steps: int) -> tuple[int, ...]:
    """The steps of `steps`, from 0, before which one of the scales changes; never the first."""
    scales = list(scales)
    points = {_begins(x, steps) for scale in scales if isinstance(scale, tuple) for x, _ in scale}

    def differs(step: int) -> bool:
        return any(scale_at(x, step, steps) != scale_at(x, step - 1, steps) for x in scales)

    return tuple(step for step in sorted(points) if 0 < step < steps and differs(step))


def unreached(scale: Scale, steps: int) -> Curve:
    """The points that act in no step: the run has none between them and the next."""
    if not isinstance(scale, tuple):
        return ()
    begins = [*(_begins(fraction, steps) for fraction, _ in scale), steps]
    return tuple(p for p, (a, b) in zip(scale, pairwise(begins), strict=True) if a >= b)


def _begins(fraction: float, steps: int) -> int:
    """The first step, from 0, that begins at `fraction` of a run or later."""
    return math.ceil(fraction * steps - 1e-6)


def deciding(block_weights: BlockWeights, layer: str) -> tuple[str, float] | None:
    """The pattern that decides for a layer, by diffusers' name, and its weight."""
    for pattern, weight in reversed(block_weights):
        if fnmatchcase(layer, pattern) or fnmatchcase(layer, f"{pattern}.*"):
            return pattern, weight
    return None


def block_names(layers: Iterable[str]) -> str:
    """The blocks that `layers` are in, for a sentence: transformer_blocks.0–7, x_embedder."""
    blocks: dict[str, list[int]] = {}
    for layer in layers:
        kind, number, *_ = (*layer.split("."), "")
        blocks.setdefault(kind, []).extend([int(number)] if number.isdigit() else [])
    return ", ".join(
        f"{kind}.{min(numbers)}" + (f"–{max(numbers)}" if len(set(numbers)) > 1 else "")
        if numbers
        else kind
        for kind, numbers in blocks.items()
    )
