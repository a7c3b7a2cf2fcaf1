"""Samplers as integrators, and on trained weights."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from klein.inference.denoise import Embeddings, Run, Tokens, denoise, noise_levels
from klein.models.samplers import SAMPLERS


def error(sampler: str, steps: int) -> float:
    """How far from e^-1 a run ends on dx/dσ = x from x(1) = 1, on uneven steps."""

    def forward(hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        return (hidden_states,)

    text = Embeddings(torch.zeros(1, 1, 1), None)
    image = Tokens(torch.ones(1, 1, 1), torch.zeros(1, 1, 4))
    one = Run(noise_levels("bfl", 1.0, steps), SAMPLERS[sampler], guidance_scale=1.0)
    return abs(float(denoise(forward, one, text, image, lambda _: None)) - math.exp(-1))


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("ab2", 2)])
def test_order(sampler: str, order: int) -> None:
    """Twice the steps leave a half of Euler's error and a quarter of ab2's."""
    for steps in (16, 32):
        halved = error(sampler, steps) / error(sampler, 2 * steps)
        assert halved == pytest.approx(2**order, rel=0.2)
