"""Which forwards of the transformer a picture takes, and what stands in for those left out.

The pipeline asks for two velocities a step, with the prompt and with the negative prompt. Sampler
answers, from one forward for both, from two, or from what earlier steps showed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from klein.models.speed import Thrift

Forward = Callable[..., tuple[Tensor]]
"""A transformer's: takes the pipeline's arguments by name, returns velocities."""


class Sampler:
    """Stands in for `forward` inside the pipeline, and counts what it runs in `forwards`.

    `paired` runs both branches of guidance as one batch. `thrift` leaves steps out; without it all
    are computed. `begin` comes before each picture.
    """

    def __init__(self, forward: Forward, *, paired: bool, thrift: Thrift | None) -> None:
        self._forward = forward
        self.paired = paired
        self._thrift = thrift
        self.forwards = 0
        self.begin(0, None)

    def begin(self, steps: int, negative: Tensor | None) -> None:
        """A picture of `steps` steps; `negative` (1, tokens, width), or None without guidance."""
        self._steps = steps
        self._negative = negative
        self._step = 0
        self._known: list[tuple[Tensor, Tensor]] = []
        self._waiting: Tensor | None = None

    def expected(self, steps: int) -> int:
        """Forwards of a picture of `steps` steps as begun."""
        computed = self._thrift.computed(steps) if self._thrift else steps
        return computed * (1 if self._negative is None else 2)

    def __call__(self, **given: Any) -> tuple[Tensor]:
        """The velocity the pipeline asks for: with the prompt, then with the negative prompt."""
        if self._waiting is None:
            velocities = self._velocities(given)
            self._step += 1
            if self._negative is not None:
                self._waiting = velocities[1:]
            return (velocities[:1],)
        waiting, self._waiting = self._waiting, None
        return (waiting,)

    def _velocities(self, given: dict[str, Any]) -> Tensor:
        """Those of this step, (1 or 2, image tokens, 128)."""
        sigma = given["timestep"][:1]
        if self._thrift and not self._thrift.due(self._step, self._steps):
            return self._carried(sigma)
        velocities = self._computed(given)
        self._known = [*self._known[-1:], (sigma, velocities)]
        return velocities

    def _computed(self, given: dict[str, Any]) -> Tensor:
        texts = [given["encoder_hidden_states"]]
        if self._negative is not None:
            texts.append(self._negative)
        self.forwards += len(texts)
        if self.paired:
            texts = [torch.cat(texts)]
        made = [self._forward(**given | {"encoder_hidden_states": text})[0] for text in texts]
        return made[0] if len(made) == 1 else torch.cat(made)

    def _carried(self, sigma: Tensor) -> Tensor:
        """On the straight line through the last two computed."""
        (before, older), (last, newer) = self._known
        return newer + (newer - older) * ((sigma - last) / (last - before))
