"""Which forwards may be left out: how far pictures of nano move, on prompts it was not trained on.

    python -m benchmarks.step_skipping                 # ways to leave forwards out of 28 steps
    python -m benchmarks.step_skipping --by steps      # klein's way, by sampler, steps and guidance
    python -m benchmarks.step_skipping --by steps --dtype bfloat16
    python -m benchmarks.step_skipping --by grid       # 1 to 100 steps, sizes, schedules: errors

Every way draws the same prompts and seeds in the eager tier. *mean*, *worst* and *99 %* are
differences, of 255, from the pictures with all forwards: over all pictures, in the worst of them,
and of the pixels.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from benchmarks.nano import GUIDANCE, STEPS, Nano, Pictures, distance, run
from klein.inference.denoise import Embeddings, Run, Step, Tokens, denoise, noise_levels
from klein.models.samplers import SAMPLERS
from klein.models.schedule import MU_RANGE, SCHEDULES, Shift, mu_of
from klein.models.speed import STEP_SKIPPING, StepSkipping

Way = Callable[[Nano], tuple[Pictures, int]]
"""Pictures, and how many forwards each took."""


def _drawn(one: Run) -> Way:
    return lambda nano: (nano.draw(one), 2 * one.computed)


def _unguided_after(step: int) -> Way:
    whole = run()
    guided = replace(whole, sigmas=whole.sigmas[: step + 1])
    rest = replace(whole, sigmas=whole.sigmas[step:], guidance_scale=1.0)
    return lambda nano: (nano.draw(guided, rest), STEPS + step)


WAYS: dict[str, Way] = {
    **{f"{steps} steps": _drawn(run(steps)) for steps in (22, 18, 16)},
    **{f"no guidance after step {step}": _unguided_after(step) for step in (22, 17)},
    **{
        f"every {every}. after {first}": _drawn(run(skipping=StepSkipping(first, every)))
        for first, every in ((2, 2), (3, 2), (4, 2), (6, 2), (4, 3))
    },
}


def by_way(nano: Nano) -> Iterator[str]:
    """A line for each way."""
    reference = nano.draw(run())
    yield f"{'way':<28}{'forwards':>9}{'mean':>8}{'worst':>8}{'99 %':>8}"
    for name, way in WAYS.items():
        pictures, forwards = way(nano)
        gaps = np.abs(pictures - reference)
        worst, tail = gaps.mean((1, 2, 3)).max(), np.percentile(gaps, 99)
        yield f"{name:<28}{forwards:9}{gaps.mean():8.3f}{worst:8.3f}{tail:8.1f}"


def by_steps(nano: Nano) -> Iterator[str]:
    """A line for each sampler, number of steps and guidance: klein's skipping against none."""
    yield f"{'sampler':<9}{'steps':>6}{'computed':>9}{'guidance':>9}{'mean':>8}"
    for sampler in SAMPLERS:
        for guidance in (GUIDANCE, 1.0):
            for steps in (4, 6, 8, 10, 12, 15, 16, 18, 20, 24, 28, 50):
                whole = run(steps, sampler, guidance_scale=guidance)
                some = replace(whole, skipping=STEP_SKIPPING)
                gap = distance(nano.draw(some), nano.draw(whole))
                yield f"{sampler:<9}{steps:6}{some.computed:9}{guidance:9}{gap:8.2f}"


# -- the line itself, without a model --------------------------------------------------------------

SLOPE, LEVEL = 3.0, 0.5
SIDES = (64, 256, 512, 640, 768, 960, 1024, 1072, 1088, 1280, 1536, 1792, 2048)
SCHEDULE_GRID: tuple[Shift, ...] = (*SCHEDULES, *MU_RANGE, 2.5, 4.0)


def worst_error(schedule: Shift, image_tokens: int, steps: int) -> float:
    """The largest error of a skipped step's velocity in bfloat16, where the true one is a straight
    line over the noise levels; as a share of it. Infinite if one is not finite."""
    mu = mu_of(schedule, image_tokens, steps)
    one = Run(noise_levels(schedule, mu, steps), SAMPLERS["euler"], 1.0, skipping=STEP_SKIPPING)
    levels = (one.sigmas[i] for i in range(steps) if one.computes(i))
    errors = [0.0]

    def forward(hidden_states: Tensor, **_: object) -> tuple[Tensor]:
        return (torch.full_like(hidden_states, LEVEL + SLOPE * next(levels)),)

    def on_step(step: Step) -> None:
        true = LEVEL + SLOPE * one.sigmas[step.number - 1]
        error = abs(float(step.velocity.max()) / true - 1)
        errors.append(error if math.isfinite(error) else math.inf)

    nothing = torch.zeros(1, 1, 1, dtype=torch.bfloat16)
    image = Tokens(nothing, torch.zeros(1, 1, 4))
    denoise(forward, one, Embeddings(nothing, None), image, on_step)
    return max(errors)


def grid() -> Iterator[str]:
    """A line for each schedule: the worst of all sizes and numbers of steps."""
    tokens = sorted({a * b // 256 for a in SIDES for b in SIDES if a * b <= 4 * 1024**2})
    for schedule in SCHEDULE_GRID:
        worst, where = max(
            (worst_error(schedule, count, steps), (count, steps))
            for count in (tokens if isinstance(schedule, str) else [1024])
            for steps in range(1, 101)
        )
        yield f"{schedule!s:<12} worst error {worst:.2%} at {where[0]} tokens, {where[1]} steps"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--by", choices=("way", "steps", "grid"), default="way")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    if args.by == "grid":
        lines = grid()
    else:
        nano = Nano(args.prompts, getattr(torch, args.dtype))
        lines = (by_way if args.by == "way" else by_steps)(nano)
    for line in lines:
        print(line, flush=True)


if __name__ == "__main__":
    main()
