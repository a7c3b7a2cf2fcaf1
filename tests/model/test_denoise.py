"""The loop on models of one line, whose right answers are known, and the samplers on nano."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchLCMScheduler
from torch import Tensor

from benchmarks.nano import Nano, distance, run
from benchmarks.step_skipping import SCHEDULE_GRID, worst_error
from klein.errors import InternalError
from klein.inference.denoise import (
    Embeddings,
    Run,
    Step,
    Tokens,
    denoise,
    extrapolated,
    noise_levels,
)
from klein.inference.latents import noise, tokens
from klein.inference.pipeline import KleinPipeline
from klein.models.samplers import SAMPLERS
from klein.models.schedule import SCHEDULES, sigmas
from klein.models.speed import STEP_SKIPPING, StepSkipping
from tests.model.conftest import drawer, load

LEVELS = (1.0, 0.95, 0.9, 0.8, 0.7, 0.5, 0.3, 0.1, 0.0)
CPU = torch.device("cpu")


def _text(*values: float) -> Embeddings:
    """Prompts of one token, of one number."""
    prompt, *negative = (torch.full((1, 1, 1), value) for value in values)
    return Embeddings(prompt, negative[0] if negative else None)


def _drawn(forward: Any, one: Run, text: Embeddings, **values: Any) -> tuple[Tensor, list[Step]]:
    image = values.pop("image", Tokens(torch.ones(1, 2, 3), torch.zeros(1, 2, 4)))
    steps: list[Step] = []
    return denoise(forward, one, text, image, steps.append, **values), steps


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_a_line_is_extrapolated_exactly(scale: float, batched: bool) -> None:
    """Velocities that lie on a line over the noise levels, with three of eight steps skipped."""
    calls: list[float] = []

    def forward(timestep: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        calls.append(float(timestep))
        branch = encoder_hidden_states[:, :1, :1]
        return ((1 + branch) * timestep + branch,)

    skipping = StepSkipping(first=2, every=3)
    one = Run(LEVELS, SAMPLERS["euler"], scale, batched_cfg=batched, skipping=skipping)
    text = Embeddings(torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    steps: list[Step] = []
    denoise(forward, one, text, Tokens(torch.zeros(1, 1, 1), torch.zeros(1, 1, 4)), steps.append)
    for sigma, step in zip(LEVELS, steps, strict=False):
        positive, negative = sigma, 2 * sigma + 1
        guided = negative + scale * (positive - negative)
        assert float(step.velocity) == pytest.approx(guided, abs=1e-5)
    assert len(steps) == one.steps == 8
    assert calls[:: 1 if batched else 2] == pytest.approx([1.0, 0.95, 0.9, 0.5, 0.1])
    assert len(calls) == one.computed * (1 if batched else 2)
    assert one.computed == 5


def test_the_line_is_right_where_timesteps_share_a_rounded_value() -> None:
    """In bfloat16, for sizes and steps at which two rounded timesteps are equal, and others."""
    rounded = torch.tensor(noise_levels("bfl", 3.23, 28)).bfloat16().tolist()
    assert len(set(rounded)) < len(rounded)
    for schedule in SCHEDULE_GRID:
        for image_tokens in (256, 2400, 4096, 16384):
            for steps in (4, 7, 15, 28, 50, 75, 100):
                assert worst_error(schedule, image_tokens, steps) < 0.02


def test_an_extrapolation_is_by_the_levels() -> None:
    """The ratio is that of the noise levels given, not of positions in the list."""
    older, newer = (1.0, torch.tensor(2.0)), (0.8, torch.tensor(3.0))
    assert float(extrapolated((older, newer), 0.7)) == pytest.approx(3.5)


@pytest.fixture(scope="module")
def in_bfloat16() -> list[KleinPipeline]:
    """nano in the dtype of a GPU, in the exact and the turbo tier."""
    return [load("nano", dtype=torch.bfloat16, KLEIN_SPEED=tier) for tier in ("exact", "turbo")]


@pytest.mark.parametrize(
    "values", [{"num_inference_steps": 75, "guidance_scale": 1}, {"schedule": 4.0}]
)
def test_turbo_in_bfloat16_is_nearly_exact(
    values: dict[str, Any], in_bfloat16: list[KleinPipeline]
) -> None:
    """Where it once was a black image: the dtype of a GPU, many steps or a strong shift."""
    asked = {"prompt": "a man with a red hat", "width": 128, "height": 128, **values}
    asked = {"num_inference_steps": 28, **asked}
    images = []
    for pipe in in_bfloat16:
        result = drawer(pipe)(**asked)
        assert result.model.dtype == "bfloat16"
        images.append(np.asarray(result.images[0].image, dtype=float))
    branches = 1 if "guidance_scale" in values else 2
    assert result.forwards == branches * STEP_SKIPPING.computed(asked["num_inference_steps"])
    assert 0 < np.abs(images[0] - images[1]).mean() < 15


@pytest.mark.parametrize(
    ("sampler", "steps"), [("euler", 14), ("ab2", 19), ("euler", 15), ("ab2", 20)]
)
def test_steps_are_skipped_only_where_that_costs_little(
    sampler: str, steps: int, in_bfloat16: list[KleinPipeline]
) -> None:
    """Of fewer none is, and the result says so."""
    draw = drawer(in_bfloat16[1])
    result = draw(num_inference_steps=steps, sampler=sampler, width=64, height=64, guidance_scale=1)
    skipped = steps >= (SAMPLERS[sampler].skips_from or 0)
    assert result.forwards == (STEP_SKIPPING.computed(steps) if skipped else steps)
    said = [warning for warning in result.warnings if "no step was skipped" in warning]
    assert len(said) == (not skipped)
    assert skipped or f"{steps} steps of {sampler} are too few" in said[0]


@pytest.mark.parametrize("name", [*SCHEDULES, 0.5, 4.0])
def test_noise_levels_are_the_schedule_rounded(name: str | float) -> None:
    """N float32 numbers that fall to 0, within float32 of the formula."""
    mu = name if isinstance(name, float) else 1.3
    levels = noise_levels(name, mu, 30)
    assert levels[-1] == 0
    assert all(a > b for a, b in pairwise(levels))
    assert all(float(np.float32(level)) == level for level in levels)
    assert levels[:-1] == pytest.approx(sigmas(mu, 30), rel=1e-6)


def test_a_run_can_begin_anywhere() -> None:
    """The second half from the first half's latents is the whole."""

    def forward(hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        return (hidden_states.cos(),)

    whole, steps = _drawn(forward, Run(LEVELS, SAMPLERS["euler"], 1.0), _text(1.0))
    half = Tokens(steps[3].latents, torch.zeros(1, 2, 4))
    rest, _ = _drawn(forward, Run(LEVELS[4:], SAMPLERS["euler"], 1.0), _text(1.0), image=half)
    assert torch.equal(rest, whole)


def test_references_are_seen_and_left_out_of_the_answer() -> None:
    """Behind the image's tokens, with their positions; only the image's velocities come back."""
    seen: list[tuple[Tensor, Tensor]] = []

    def forward(hidden_states: Tensor, img_ids: Tensor, **_: Any) -> tuple[Tensor]:
        seen.append((hidden_states, img_ids))
        return (hidden_states,)

    image = noise(32, 48, 1, torch.float32, CPU)
    reference = tokens(torch.full((1, 128, 2, 2), 7.0), time=10)
    one = Run((1.0, 0.5, 0.0), SAMPLERS["euler"], 1.0)
    made, _ = _drawn(forward, one, _text(1.0), image=image, references=reference)
    assert made.shape == image.latents.shape == (1, 6, 128)
    for latents, ids in seen:
        assert torch.equal(latents[:, 6:], reference.latents)
        assert ids[0, 6:].tolist() == [[10, 0, 0, 0], [10, 0, 1, 0], [10, 1, 0, 0], [10, 1, 1, 0]]
        assert ids[0, :6, 0].tolist() == [0] * 6


def test_a_step_shows_where_it_leads() -> None:
    """Numbered from 1, at the level it reached; a velocity of noise - clean points to clean."""
    clean, start = torch.full((1, 2, 3), 0.25), torch.ones(1, 2, 3)
    one = Run(LEVELS, SAMPLERS["ab2"], 1.0)
    made, steps = _drawn(lambda **_: (start - clean,), one, _text(1.0))
    assert [(step.number, step.sigma) for step in steps] == list(enumerate(LEVELS[1:], 1))
    assert all(torch.allclose(step.clean, clean) for step in steps)
    assert torch.allclose(made, clean)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_latents_that_are_not_finite_are_an_error(value: float) -> None:
    """With the step that made them; every step ran, since nothing waits for the GPU in between."""
    calls = 0

    def forward(hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        nonlocal calls
        calls += 1
        return (torch.full_like(hidden_states, value if calls == 3 else 1.0),)

    with pytest.raises(InternalError, match="step 3 of 8 gave values that are not finite"):
        _drawn(forward, Run(LEVELS, SAMPLERS["euler"], 1.0), _text(1.0))
    assert calls == 8


def test_ab2_with_16_steps_is_as_near_as_euler_with_28() -> None:
    """To where many steps lead; `python -m benchmarks.samplers` has the whole table."""
    nano = Nano(1)
    converged = nano.draw(run(48, "ab2"))
    euler, ab2 = (
        distance(nano.draw(run(steps, name)), converged)
        for steps, name in ((28, "euler"), (16, "ab2"))
    )
    assert 0 < ab2 <= 1.05 * euler


def test_lcm_is_diffusers() -> None:
    """Step by step FlowMatchLCMScheduler's, with the same noise; a preview sees the clean image."""
    theirs = FlowMatchLCMScheduler(num_train_timesteps=1000)
    theirs.set_timesteps(sigmas=list(LEVELS[:-1]), device="cpu")
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]

    def forward(hidden_states: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        return (hidden_states.cos() * timestep,)

    def noise() -> Tensor:
        return torch.randn(1, 2, 3, generator=generators[0])

    run = Run(LEVELS, SAMPLERS["lcm"], 1.0)
    made, steps = _drawn(forward, run, _text(1.0), noise=noise)
    expected = torch.ones(1, 2, 3)
    for timestep, step in zip(theirs.timesteps, steps, strict=True):
        velocity = forward(expected, timestep[None] / 1000)[0]
        sigma = theirs.sigmas[len(steps) if theirs.step_index is None else theirs.step_index]
        clean = expected - (LEVELS[0] if theirs.step_index is None else sigma) * velocity
        expected = theirs.step(velocity, timestep, expected, generators[1], return_dict=False)[0]
        assert torch.allclose(step.latents, expected, atol=1e-5)
        assert torch.allclose(step.clean, clean, atol=1e-5)
    assert torch.allclose(made, clean, atol=1e-5)


def test_given_noise_levels_are_taken_as_they_are(in_bfloat16: list[KleinPipeline]) -> None:
    """As many steps as there are, without a mu; lcm skips none of them and says so."""
    asked = {"width": 64, "height": 64, "guidance_scale": 1, "sampler": "lcm"}
    draw = drawer(in_bfloat16[1])
    levels = [1 - i / 20 for i in range(20)]
    result = draw(**asked, schedule=levels, num_inference_steps=None)
    assert (result.sigmas, result.mu, result.forwards) == (tuple(levels), None, 20)
    assert "no step was skipped: lcm draws new noise in each" in result.warnings
    first, second = (draw(**asked, num_images=2, seed=s).images for s in (5, 6))
    assert np.array_equal(np.asarray(first[1].image), np.asarray(second[0].image))
    assert not np.array_equal(np.asarray(first[0].image), np.asarray(first[1].image))
