"""The samplers: how a step goes from one noise level to the next, given the velocities so far.

Each is a linear multistep method on dx/dσ = v(x, σ): a step adds Σ cᵢ · vᵢ to the latents, with
the newest velocity first. The coefficients need no more than the run's noise levels. A sampler that
renoises steps to the clean latents instead, and mixes them with new noise at the next level.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Coefficients = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Sampler:
    """One sampler. `label` is what other programs call it, `history` how many velocities a step
    reads, its own included; `renoises` is whether each step draws new noise.

    `skips_from` is the least number of steps of which step skipping leaves some out: with fewer
    it changes images more than rounding to float8 does (SPEED.md, "Samplers"). None is never.
    """

    name: str
    label: str
    history: int
    skips_from: int | None
    coefficients: Callable[[Sequence[float], int], Coefficients]
    """Of step `i` over `sigmas`, N levels and the 0 after them; the newest velocity's first."""
    doc: str
    renoises: bool = False


def _euler(sigmas: Sequence[float], i: int) -> Coefficients:
    return (sigmas[i + 1] - sigmas[i],)


def _ab2(sigmas: Sequence[float], i: int) -> Coefficients:
    """Second-order Adams–Bashforth on uneven steps; the first step is Euler's."""
    if i == 0:
        return _euler(sigmas, i)
    step = sigmas[i + 1] - sigmas[i]
    ratio = step / (sigmas[i] - sigmas[i - 1])
    return step * (1 + ratio / 2), -step * ratio / 2


def _clean(sigmas: Sequence[float], i: int) -> Coefficients:
    """All the way, along the velocity."""
    return (-sigmas[i],)


SAMPLERS: dict[str, Sampler] = {
    row.name: row
    for row in (
        Sampler(
            "euler", "Euler", 1, 15, _euler, "Euler's method, as diffusers samples; the default"
        ),
        Sampler(
            "ab2",
            "Adams-Bashforth 2",
            2,
            20,
            _ab2,
            "second-order Adams–Bashforth: 16 steps for Euler's 28",
        ),
        Sampler(
            "lcm",
            "LCM",
            1,
            None,
            _clean,
            "to the clean image and back with new noise in every step: for few steps with a turbo "
            "LoRA",
            renoises=True,
        ),
    )
}
DEFAULT_SAMPLER = "euler"
