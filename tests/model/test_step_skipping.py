"""Step skipping in bfloat16, where the numbers of a run are coarse.

`python -m tests.model.test_step_skipping` draws the whole grid on nano (an hour on two cores).
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from klein.core import GenerationResult
from klein.inference import assemble
from klein.inference.denoise import extrapolated, noise_levels
from klein.inference.pipeline import KleinPipeline
from klein.models import schedule, sizes
from klein.models.speed import STEP_SKIPPING
from klein.request.presets import PRESETS
from tests.model.conftest import drawer, load, planned, with_loras

STEPS = range(1, 101)
SHIFTS: list[schedule.Shift] = [*schedule.SCHEDULES, -2.0, 0.0, 2.0, 4.0, 6.0, 8.0]
SIZES = sorted({(p.width, p.height) for p in PRESETS.values()} | {(64, 64), (512, 512)})
PROMPT = "a woman with a green hat"


def skipped(levels: tuple[float, ...]) -> Iterator[tuple[int, int, int]]:
    """Two computed steps and the step that is extrapolated from them, for all that are skipped."""
    computed: deque[int] = deque(maxlen=2)
    for step in range(len(levels) - 1):
        if STEP_SKIPPING.computes(step, len(levels) - 1):
            computed.append(step)
        else:
            yield computed[0], computed[1], step


@pytest.mark.parametrize("shift", SHIFTS)
def test_every_run_extrapolates_along_its_own_levels(shift: schedule.Shift) -> None:
    """1 to 100 steps, all sizes: the ratio is that of the exact levels, and velocities in bfloat16
    stay finite and within the ratio's reach."""
    for (width, height), steps in product(SIZES, STEPS):
        mu = schedule.mu_of(shift, sizes.tokens(width, height), steps)
        levels, exact = noise_levels(shift, mu, steps), schedule.sigmas(mu, steps)
        for before, last, step in skipped(levels):
            ratio = (exact[step] - exact[last]) / (exact[last] - exact[before])
            assert 0 < ratio < 4
            for dtype, near in ((torch.float64, 0.05), (torch.bfloat16, 0.06)):
                older, newer = torch.tensor([1.0, 2.0]).to(dtype)
                given = (levels[before], older), (levels[last], newer)
                made = extrapolated(given, levels[step])
                assert made.dtype == dtype
                assert float(made) - 2 == pytest.approx(ratio, rel=near), (steps, step)


def loaded(*options: str) -> KleinPipeline:
    """nano in bfloat16 with the forward of the turbo tier and `options` of its options: a CPU takes
    long to imitate float8."""
    plan, settings = planned("nano", KLEIN_SPEED="turbo")
    chosen = replace(plan.acceleration, options=("fused", "batched_cfg", *options))
    pipe = assemble.load(replace(plan, acceleration=chosen), settings, dtype=torch.bfloat16)
    return with_loras(pipe, None)


@pytest.fixture(scope="module")
def whole() -> KleinPipeline:
    return loaded()


@pytest.fixture(scope="module")
def skipping() -> KleinPipeline:
    return loaded("step_skipping")


def pixels(result: GenerationResult) -> NDArray[np.float32]:
    return np.asarray(result.images[0].image, np.float32)


def apart(skipping: KleinPipeline, whole: KleinPipeline, **values: Any) -> float:
    """The mean difference of 255 that step skipping makes; neither image is of one colour."""
    images = [pixels(drawer(pipe)(prompt=PROMPT, **values)) for pipe in (skipping, whole)]
    assert all(image.std() > 20 for image in images), values
    return float(np.abs(images[0] - images[1]).mean())


@pytest.mark.parametrize(
    ("steps", "shift"),
    [
        (15, "bfl"),
        (15, "linear"),
        (28, "linear"),
        pytest.param(75, 4.0, marks=pytest.mark.long),
        pytest.param(100, 8.0, marks=pytest.mark.long),
    ],
)
def test_images_in_bfloat16(
    skipping: KleinPipeline, whole: KleinPipeline, steps: int, shift: schedule.Shift
) -> None:
    """Finite, and near to those with all steps."""
    values = {"width": 96, "height": 128, "num_inference_steps": steps, "schedule": shift}
    difference = apart(skipping, whole, **values)
    print(f"{steps} steps, {shift}: {difference:.2f}")
    assert difference < 4


@pytest.mark.parametrize(("steps", "left_out"), [(14, True), (15, False)])
def test_short_runs_stay_whole(steps: int, left_out: bool) -> None:
    """In the turbo tier all steps are computed where fewer than ten would be; the result says so
    once."""
    draw = drawer(load("nano", KLEIN_SPEED="turbo"))
    values = {"num_inference_steps": steps, "width": 64, "height": 64, "guidance_scale": 1}
    result = draw(prompt=PROMPT, **values)
    assert result.forwards == (14 if left_out else 10)
    said = [each for each in result.warnings if "no step was skipped" in each]
    assert len(said) == left_out
    assert not left_out or "14 steps of euler are too few" in said[0]


def main() -> None:
    """Draw every preset, size of nano and number of steps; print what step skipping changes."""
    pipes = loaded("step_skipping"), loaded()
    grid = product(PRESETS, ((128, 128), (256, 256), (192, 384)), (*range(15, 101, 5), 28))
    for preset, (width, height), steps in grid:
        values = {"preset": preset, "width": width, "height": height, "num_inference_steps": steps}
        print(preset, width, height, steps, f"{apart(*pipes, **values):.2f}", flush=True)


if __name__ == "__main__":
    main()
