"""Starting from a picture, and keeping parts of it while the rest is drawn."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from klein.inference.denoise import Tokens
from klein.models.sizes import MULTIPLE


@dataclass(frozen=True, slots=True)
class Start:
    """A picture to start from: its clean latents and the run's noise, both (1, n, 128)."""

    clean: Tensor
    noise: Tensor

    def at(self, sigma: float) -> Tensor:
        """The picture under noise of level `sigma`, rounded as diffusers' `scale_noise` does."""
        level = torch.tensor(sigma, dtype=self.clean.dtype, device=self.clean.device)
        return level * self.noise + (1.0 - level) * self.clean


@dataclass(frozen=True, slots=True)
class Keep:
    """What of a picture stays: `repaint` (1, n, 1) is 1 where tokens are drawn and 0 elsewhere."""

    start: Start
    repaint: Tensor

    def __call__(self, latents: Tensor, sigma: float) -> Tensor:
        """`latents` (1, n, 128) at noise level `sigma` with the kept tokens put back."""
        kept = self.start.clean if sigma == 0 else self.start.at(sigma)
        return (1 - self.repaint) * kept + self.repaint * latents


def token_mask(mask: Image, like: Tokens) -> Tensor:
    """A mask (L, 255 is repainted) by tokens (1, n, 1): 1 for each that has a repainted pixel."""
    pixels = torch.from_numpy(np.asarray(mask) > 0).float()[None, None]
    cells = F.max_pool2d(pixels, MULTIPLE)
    return cells.flatten(2).permute(0, 2, 1).to(like.latents)
