"""Pictures on the way: small ones by a linear map of the latents, and some by the VAE itself.

The map is fitted to the VAE that is loaded (least squares over coloured patches it encodes), so it
belongs to any VAE and needs no table. Nothing waits for the GPU: a small picture is copied while
the next step runs, and told when it has arrived.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from klein.core import Preview, PreviewRequest
from klein.inference import latents
from klein.inference.denoise import Step
from klein.models.sizes import MULTIPLE

PATCHES = 256
"""Side in pixels of the picture that the map is fitted to."""
SCALE = 8
"""Pixels of the image for one of a small picture, each way."""
RIDGE = 1e-3


@dataclass(frozen=True, slots=True)
class LinearMap:
    """From 32 channels of normalised latents and a constant to red, green and blue, 0 to 1."""

    factors: Tensor

    @classmethod
    def fit(cls, vae: Any) -> "LinearMap":
        """The map that is nearest to what `vae` encodes of coloured patches of several sizes."""
        random = np.random.default_rng(0)
        picture = np.zeros((PATCHES, PATCHES, 3), np.float32)
        for cells in (4, 8, 16):
            colours = Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            picture += np.asarray(colours.resize((PATCHES, PATCHES), Image.Resampling.BICUBIC)) / 3
        image = Image.fromarray(picture.astype(np.uint8))
        seen = _with_constant(latents.encode(vae, image))
        small = image.resize((PATCHES // SCALE, PATCHES // SCALE), Image.Resampling.BOX)
        wanted = torch.from_numpy(np.asarray(small, np.float32) / 255).flatten(0, 1).to(seen)
        # Ridge regression in double: channels that say nothing of colour stay near 0.
        seen, wanted = seen.double(), wanted.double()
        gram = seen.T @ seen + RIDGE * len(seen) * torch.eye(seen.shape[1]).to(seen)
        return cls(torch.linalg.solve(gram, seen.T @ wanted).float())

    def levels(self, packed: Tensor) -> Tensor:
        """Bytes (2h, 2w, 3) of packed latents (1, 128, h, w)."""
        height, width = packed.shape[2] * 2, packed.shape[3] * 2
        colours = (_with_constant(packed) @ self.factors).clamp(0, 1)
        return (colours * 255).round().to(torch.uint8).view(height, width, 3)


def _with_constant(packed: Tensor) -> Tensor:
    """Latents (1, 128, h, w) as rows (4hw, 33), float32, the last column 1."""
    rows = F.pixel_shuffle(packed.float(), 2)[0].flatten(1).T
    return torch.cat([rows, torch.ones_like(rows[:, :1])], 1)


class Previews:
    """The previews of one image: call it after each step, and `flush` after the last."""

    def __init__(
        self,
        wanted: PreviewRequest,
        steps: int,
        image: int,
        size: tuple[int, int],
        fitted: Callable[[], LinearMap],
        decode: Callable[[Tensor], Image.Image],
    ) -> None:
        """`size` in pixels; `decode` makes an image of clean latents (1, n, 128)."""
        self._wanted = wanted
        self._steps = steps
        self._image = image
        self._rows, self._columns = size[1] // MULTIPLE, size[0] // MULTIPLE
        self._fitted = fitted
        self._decode = decode
        self._decoded_at = {
            steps * part // (wanted.decoded + 1) for part in range(1, wanted.decoded + 1)
        } - {0}
        self._pending: list[tuple[int, Tensor, Tensor, Any]] = []

    def __call__(self, step: Step) -> None:
        """Tell what has arrived, and start what this step is to show; of latents that are not
        finite there is nothing to show."""
        self._tell(lambda arrived: arrived is None or arrived.query())
        every, last = self._wanted.every, step.number == self._steps
        if every and step.number % every == 0 and not last:
            self._start(step)
        if step.number in self._decoded_at and step.clean.isfinite().all():
            picture = self._decode(step.clean)
            self._wanted.receive(
                Preview(step.number, self._steps, self._image, picture, decoded=True)
            )

    def flush(self) -> None:
        """Tell the rest."""
        self._tell(lambda arrived: arrived is None or arrived.synchronize() is None)

    def _start(self, step: Step) -> None:
        packed = step.clean.reshape(1, self._rows, self._columns, -1).permute(0, 3, 1, 2)
        made, arrived = (self._fitted().levels(packed), packed.isfinite().all()), None
        if packed.is_cuda:
            made = _on_the_way(made[0]), _on_the_way(made[1])
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        self._pending.append((step.number, *made, arrived))

    def _tell(self, ready: Callable[[Any], bool]) -> None:
        while self._pending and ready(self._pending[0][-1]):
            number, levels, finite, _ = self._pending.pop(0)
            if finite:
                picture = Image.fromarray(levels.numpy())
                self._wanted.receive(Preview(number, self._steps, self._image, picture))


def _on_the_way(tensor: Tensor) -> Tensor:
    """A copy in main memory, there when the stream gets to it."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
