"""klein's denoise loop: from noise to a clean latent along the run's noise levels.

Every formula takes the run's own noise levels, Python floats. What the model is given is what
Flux2KleinPipeline gives it, the timestep rounded to the latents' type included, so in float32 on a
CPU the latents are that pipeline's bit for bit.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from klein.errors import InternalError
from klein.models.samplers import Sampler
from klein.models.schedule import Shift
from klein.models.speed import StepSkipping

Forward = Callable[..., tuple[Tensor]]
"""A transformer's: takes Flux2Transformer2DModel's arguments by name, returns velocities."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Latents (1, n, 128) and their positions (1, n, 4): time, row, column, layer."""

    latents: Tensor
    ids: Tensor


@dataclass(frozen=True, slots=True)
class Embeddings:
    """A prompt's (1, tokens, width), and a negative prompt's or None without guidance."""

    prompt: Tensor
    negative: Tensor | None

    @property
    def branches(self) -> tuple[Tensor, ...]:
        """One, or two with guidance."""
        return (self.prompt,) if self.negative is None else (self.prompt, self.negative)


@dataclass(frozen=True, slots=True)
class Run:
    """How an image is drawn: `sigmas` are N falling noise levels and the 0 after them.

    `batched_cfg` runs both branches of guidance as one batch, which takes a forward that shares one
    image among several texts; `skipping` leaves steps out, None computes all. `changes` are the
    steps, from 0 and rising, before which the model's weights change: what was computed before says
    nothing of the velocities after it, so sampler and extrapolation begin anew there.
    """

    sigmas: tuple[float, ...]
    sampler: Sampler
    guidance_scale: float
    batched_cfg: bool = False
    skipping: StepSkipping | None = None
    changes: tuple[int, ...] = ()

    @property
    def steps(self) -> int:
        """How often the sampler steps."""
        return len(self.sigmas) - 1

    @property
    def computed(self) -> int:
        """In how many of the steps the transformer runs."""
        return sum(map(self.computes, range(self.steps)))

    def computes(self, step: int) -> bool:
        """Whether the transformer runs in step `step`, from 0: always in the first two with the
        same weights, since a line takes two velocities."""
        if self.skipping is None or self.skipping.computes(step, self.steps):
            return True
        return step - self.changed_at(step) < 2

    def changed_at(self, step: int) -> int:
        """The step from which the model's weights are those of step `step`."""
        return max((change for change in self.changes if change <= step), default=0)

    def coefficients(self, step: int) -> Sequence[float]:
        """The sampler's, of step `step`, for the velocities with the weights of that step."""
        start = self.changed_at(step)
        return self.sampler.coefficients(self.sigmas[start:], step - start)


@dataclass(frozen=True, slots=True)
class Step:
    """A finished step, `number` from 1: the noise level it reached, the latents there (1, n, 128),
    and the velocity that led to them."""

    number: int
    sigma: float
    latents: Tensor
    velocity: Tensor

    @property
    def clean(self) -> Tensor:
        """The clean latents that the velocity points to, float32."""
        return self.latents.float() - self.sigma * self.velocity


def noise_levels(schedule: Shift, mu: float, steps: int) -> tuple[float, ...]:
    """The `steps` levels of a run and the 0 after them, rounded to float32 where diffusers rounds:
    as its dynamic shift does for "bfl", as its static shift by e^mu does for any other schedule."""
    grid = np.linspace(1.0, 1 / steps, steps).astype(np.float32)
    shift = math.exp(mu)
    if schedule == "bfl":
        levels = shift / (shift + (1 / grid - 1))
    else:
        levels = shift * grid / (1 + (shift - 1) * grid)
    return (*levels.tolist(), 0.0)


def denoise(
    forward: Forward,
    run: Run,
    text: Embeddings,
    image: Tokens,
    on_step: Callable[[Step], None],
    references: Tokens | None = None,
    keep: Callable[[Tensor, float], Tensor] | None = None,
    noise: Callable[[], Tensor] | None = None,
    on_change: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """The latents (1, n, 128) at the end of `run` from `image` with noise of its first level.

    `references` are tokens that the model sees beside the image; `keep` is given each step's
    latents and noise level and puts back what is not to change; `noise` gives new noise of the
    latents' shape to a sampler that renoises; `on_change` changes the weights before a step of the
    run's `changes`. What `on_step` raises ends the run; values that are not finite raise NotFinite
    after the last step.
    """
    model = _GuidedModel(forward, run, text, image.ids, references)
    timesteps = _timesteps(run.sigmas[:-1], image.latents)
    latents = image.latents
    computed: deque[tuple[float, Tensor]] = deque(maxlen=2)
    velocities: deque[Tensor] = deque(maxlen=run.sampler.history)
    finite: list[Tensor] = []
    for step, sigma in enumerate(run.sigmas[:-1]):
        if step in run.changes:
            on_change(step)
            computed.clear()
            velocities.clear()
        if run.computes(step):
            velocity = model(latents, timesteps[step : step + 1])
            computed.append((sigma, velocity))
        else:
            velocity = extrapolated(computed, sigma)
        velocities.appendleft(velocity)
        latents = _moved(latents, run.coefficients(step), velocities)
        if run.sampler.renoises and noise is not None:
            latents, velocity = _renoised(latents, run.sigmas[step + 1], noise())
        if keep is not None:
            latents = keep(latents, run.sigmas[step + 1])
        finite.append(latents.isfinite().all())
        on_step(Step(step + 1, run.sigmas[step + 1], latents, velocity))
    _require_finite(finite)
    return latents


def extrapolated(computed: Iterable[tuple[float, Tensor]], sigma: float) -> Tensor:
    """The velocity at `sigma` on the line through two earlier ones, each with its noise level."""
    (before, older), (last, newer) = computed
    return newer + (newer - older) * ((sigma - last) / (last - before))


class _GuidedModel:
    """The transformer under classifier-free guidance: one velocity from one or two branches."""

    def __init__(
        self,
        forward: Forward,
        run: Run,
        text: Embeddings,
        image_ids: Tensor,
        references: Tokens | None,
    ) -> None:
        self._forward = forward
        self._scale = run.guidance_scale
        self._texts = [torch.cat(text.branches)] if run.batched_cfg else list(text.branches)
        self._references = references
        self._ids: dict[str, Any] = {
            "img_ids": image_ids if not references else torch.cat([image_ids, references.ids], 1),
            "txt_ids": text_ids(text.prompt),
        }

    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """Of latents (1, n, 128) at a timestep (1,), 0 to 1; the same shape."""
        tokens = latents
        if self._references:
            tokens = torch.cat([latents, self._references.latents], 1)
        made = [
            self._forward(
                hidden_states=tokens,
                timestep=timestep,
                guidance=None,
                encoder_hidden_states=text,
                **self._ids,
            )[0]
            for text in self._texts
        ]
        velocities = torch.cat(made)[:, : latents.shape[1]]
        if len(velocities) == 1:
            return velocities
        positive, negative = velocities[:1], velocities[1:]
        return negative + self._scale * (positive - negative)


def text_ids(embeddings: Tensor) -> Tensor:
    """Positions (1, tokens, 4) of a prompt's embeddings."""
    axes = (torch.arange(n) for n in (1, 1, 1, embeddings.shape[1]))
    return torch.cartesian_prod(*axes)[None].to(embeddings.device)


def _timesteps(sigmas: Sequence[float], like: Tensor) -> Tensor:
    """What the model is told of each noise level (n,), rounded as in Flux2KleinPipeline."""
    timesteps = torch.tensor(sigmas, dtype=torch.float32, device=like.device) * 1000
    return timesteps.to(like.dtype) / 1000


def _moved(latents: Tensor, coefficients: Sequence[float], velocities: Iterable[Tensor]) -> Tensor:
    """One step of a linear multistep method, summed in float32."""
    moved = latents.float()
    for coefficient, velocity in zip(coefficients, velocities, strict=True):
        moved = moved + coefficient * velocity
    return moved.to(latents.dtype)


def _renoised(clean: Tensor, sigma: float, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Clean latents mixed with noise at the level `sigma`, and the velocity from one to the other;
    as FlowMatchLCMScheduler of diffusers does."""
    mixed = (1 - sigma) * clean.float() + sigma * noise.float()
    return mixed.to(clean.dtype), noise.float() - clean.float()


class NotFinite(InternalError):
    """A step whose latents are no numbers."""


def _require_finite(finite: list[Tensor]) -> None:
    """Raise NotFinite that names the first step whose latents were not; waits for the GPU."""
    steps = torch.stack(finite).tolist()
    if not all(steps):
        raise NotFinite(
            f"step {steps.index(False) + 1} of {len(steps)} gave values that are not finite, so "
            "there is no image: try another seed, lower LoRA scales or KLEIN_SPEED=eager"
        )
