"""Reference images as tokens beside the image: encoded once, remembered by their content."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from klein.core import InputImage
from klein.inference import latents
from klein.inference.denoise import Tokens

FIRST_TIME, NEXT_TIME = 10, 10
"""The time id of the first reference, and what each further one adds."""
KEPT_TOKENS = 65_536
"""Of pictures used lately: sixteen of a megapixel, 16 MB of latents in bfloat16."""


class ImageEncoder:
    """Encodes callers' pictures with the VAE. One job at a time."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()

    def encode(self, image: Image) -> Tensor:
        """The latents (1, 128, h / 16, w / 16) of an RGB image, remembered by its pixels."""
        key = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
        if key not in self._kept:
            self._kept[key] = latents.encode(self._vae, image)
        self._kept.move_to_end(key)
        while len(self._kept) > 1 and self._tokens() > KEPT_TOKENS:
            self._kept.popitem(last=False)
        return self._kept[key]

    def references(self, images: Sequence[InputImage]) -> Tokens | None:
        """The tokens of all references in their order, or None without any."""
        if not images:
            return None
        parts = [
            latents.tokens(self.encode(each.image), FIRST_TIME + NEXT_TIME * number)
            for number, each in enumerate(images)
        ]
        return Tokens(
            torch.cat([part.latents for part in parts], 1),
            torch.cat([part.ids for part in parts], 1),
        )

    def forget(self) -> None:
        """Give the memory back."""
        self._kept.clear()

    def _tokens(self) -> int:
        return sum(kept.shape[2] * kept.shape[3] for kept in self._kept.values())
