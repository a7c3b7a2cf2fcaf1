"""The time shift: how the noise levels of a run are spread, as pure functions.

A run of N steps takes the uniform grid t = 1, 1 - 1/N, …, 1/N and bends it:

    sigma(t) = e^mu / (e^mu + 1/t - 1)

A larger mu spends more of the steps at high noise, where composition is decided. The named
schedules differ in mu alone, which depends on the number of image tokens (width/16 · height/16).
"""

import math
from collections.abc import Sequence
from itertools import pairwise

MAX_STEPS = 100
MU_RANGE = (-2.0, 8.0)
BFL_LIMIT = 4300
"""Tokens above which Black Forest Labs' formula drops to the FLUX.1 line: at 28 steps mu falls
from 2.15 to 1.19 between 1024×1072 and 1024×1088, and pictures change their look with it."""

# The FLUX.1 line: mu 0.5 at 256 tokens, 1.15 at 4096.
_BASE_TOKENS, _MAX_TOKENS, _BASE_SHIFT, _MAX_SHIFT = 256, 4096, 0.5, 1.15
_SLOPE = (_MAX_SHIFT - _BASE_SHIFT) / (_MAX_TOKENS - _BASE_TOKENS)


def bfl_mu(image_tokens: int, num_inference_steps: int) -> float:
    """mu of Black Forest Labs' sampler and, to the bit, of diffusers' `compute_empirical_mu`."""
    at_200 = 0.00016927 * image_tokens + 0.45666666
    if image_tokens > BFL_LIMIT:
        return at_200
    at_10 = 8.73809524e-05 * image_tokens + 1.89833333
    slope = (at_200 - at_10) / 190.0
    return slope * num_inference_steps + (at_200 - 200.0 * slope)


def ai_toolkit_mu(image_tokens: int, num_inference_steps: int = 0) -> float:
    """mu of ai-toolkit's training previews: the FLUX.1 line, whatever the number of steps."""
    return _BASE_SHIFT + _SLOPE * (image_tokens - _BASE_TOKENS)


def linear_mu(image_tokens: int, num_inference_steps: int = 0) -> float:
    """mu as klein's predecessor documented it, with `image_seq_len` counted in image tokens.

    It leaves the 256 base tokens out of the line, so it lies 0.0433 above `ai_toolkit_mu`.
    """
    return _SLOPE * image_tokens + _BASE_SHIFT


SCHEDULES = {
    "bfl": (bfl_mu, "as Black Forest Labs and diffusers sample; the default"),
    "ai_toolkit": (ai_toolkit_mu, "as ai-toolkit draws the previews of a LoRA in training"),
    "linear": (linear_mu, "as klein's predecessor documented its shift"),
}

Shift = str | float
"""A name from SCHEDULES, or mu itself."""
Schedule = Shift | tuple[float, ...]
"""A time shift, or the noise levels themselves, falling, without the 0 after them."""


def fault(levels: Sequence[float]) -> str | None:
    """Why no run can take these noise levels, or None if one can."""
    if not 1 <= len(levels) <= MAX_STEPS:
        return f"{len(levels)} noise levels are given, 1 to {MAX_STEPS} make a run"
    if not all(0 < level <= 1 for level in levels):
        return "noise levels are above 0 and at most 1; the 0 after the last is understood"
    if any(after >= before for before, after in pairwise(levels)):
        return "noise levels must fall from one to the next"
    return None


def mu_of(schedule: Shift, image_tokens: int, num_inference_steps: int) -> float:
    """mu that `schedule` gives a picture of that many image tokens in that many steps."""
    if isinstance(schedule, str):
        return SCHEDULES[schedule][0](image_tokens, num_inference_steps)
    return schedule


def sigmas(mu: float, num_inference_steps: int) -> list[float]:
    """The noise levels of a run, from 1 down to the last one before 0; N values. A run rounds them
    to float32 as diffusers does (`klein.inference.denoise.noise_levels`)."""
    shift = math.exp(mu)
    grid = (1 - i / num_inference_steps for i in range(num_inference_steps))
    return [shift / (shift + 1 / t - 1) for t in grid]


def first_step(num_inference_steps: int, strength: float | None) -> int:
    """The index of a run's first step: 0 from pure noise, later the less of a start image is to
    change. At least one step is left for any strength above 0. As diffusers' `get_timesteps`."""
    if strength is None:
        return 0
    skipped = int(max(num_inference_steps - num_inference_steps * strength, 0))
    return min(skipped, num_inference_steps - 1)
