"""Which forwards may be left out: how far pictures of nano move, on prompts it was not trained on.

    python -m benchmarks.step_skipping                 # ways to leave forwards out of 28 steps
    python -m benchmarks.step_skipping --by steps      # klein's way, by sampler, steps and guidance
    python -m benchmarks.step_skipping --by steps --dtype bfloat16

Every way draws the same prompts and seeds in the eager tier. *mean*, *worst* and *99 %* are
differences, of 255, from the pictures with all forwards: over all pictures, in the worst of them,
and of the pixels.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch

from benchmarks.nano import GUIDANCE, STEPS, Nano, Pictures, distance, run
from klein.inference.denoise import Run
from klein.models.samplers import SAMPLERS
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


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--by", choices=("way", "steps"), default="way")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    nano = Nano(args.prompts, getattr(torch, args.dtype))
    for line in {"way": by_way, "steps": by_steps}[args.by](nano):
        print(line, flush=True)


if __name__ == "__main__":
    main()
