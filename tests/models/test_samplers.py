"""The samplers on an equation with a known solution; no model is needed for that."""

import math
from collections import deque
from itertools import pairwise

import pytest

from klein.models.samplers import SAMPLERS, Sampler
from klein.models.schedule import sigmas

ORDERS = {"euler": 1, "ab2": 2}
"""Of the methods that follow the equation; others draw noise on the way."""


def _error(sampler: Sampler, steps: int, mu: float) -> float:
    """Of x(0) for dx/dσ = cos(3σ) - x from x(1) = 1, over the uneven levels of a schedule."""
    levels = [*sigmas(mu, steps), 0.0]
    x, velocities = 1.0, deque[float](maxlen=sampler.history)
    for step, sigma in enumerate(levels[:-1]):
        velocities.appendleft(math.cos(3 * sigma) - x)
        coefficients = sampler.coefficients(levels, step)
        x += sum(c * v for c, v in zip(coefficients, velocities, strict=True))

    def particular(sigma: float) -> float:
        return (math.cos(3 * sigma) + 3 * math.sin(3 * sigma)) / 10

    return abs(x - (particular(0) + (1 - particular(1)) * math.e))


@pytest.mark.parametrize("mu", [0.0, 0.63, 1.15])
@pytest.mark.parametrize("name", ORDERS)
def test_the_error_falls_with_the_order(name: str, mu: float) -> None:
    """Twice the steps: half the error for a first-order method, a quarter for a second-order."""
    errors = [_error(SAMPLERS[name], steps, mu) for steps in (200, 400, 800)]
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2 ** ORDERS[name], rel=0.1)


@pytest.mark.parametrize("name", ORDERS)
def test_a_step_covers_its_distance(name: str) -> None:
    """The coefficients of each step sum to it, so a constant velocity is followed exactly; none
    reads more velocities than there are."""
    levels = [*sigmas(2.0, 9), 0.0]
    for step, (sigma, following) in enumerate(pairwise(levels)):
        coefficients = SAMPLERS[name].coefficients(levels, step)
        assert sum(coefficients) == pytest.approx(following - sigma)
        assert len(coefficients) == min(step + 1, SAMPLERS[name].history)


def test_the_others_draw_noise() -> None:
    """Every sampler is measured above, or goes to the clean image in each step; such a one skips
    none, since there is no line through its velocities."""
    for name in SAMPLERS.keys() - ORDERS.keys():
        sampler = SAMPLERS[name]
        assert (sampler.renoises, sampler.skips_from) == (True, None)
        assert sampler.coefficients([0.8, 0.4, 0.0], 0) == (-0.8,)
