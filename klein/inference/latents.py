"""Between pixels and the tokens that the transformer sees, as Flux2KleinPipeline goes."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from klein.errors import InternalError
from klein.inference.denoise import Tokens
from klein.models.sizes import MULTIPLE

CHANNELS = 128
"""Of a token: 2×2 neighbours of the VAE's 32 channels."""


def noise(width: int, height: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tokens:
    """The noise of a seed for an image of that size in pixels, the same on every device."""
    return next(noises(width, height, seed, dtype, device))


def noises(
    width: int, height: int, seed: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Tokens]:
    """The noise of a seed, then as many more that follow from it."""
    shape = (1, CHANNELS, height // MULTIPLE, width // MULTIPLE)
    generator = torch.Generator("cpu").manual_seed(seed)
    while True:
        yield tokens(torch.randn(shape, generator=generator, dtype=dtype).to(device))


def tokens(latents: Tensor, time: int = 0) -> Tokens:
    """Latents (1, 128, h, w) as tokens in rows; `time` sets reference images apart."""
    _, _, height, width = latents.shape
    axes = torch.tensor([time]), torch.arange(height), torch.arange(width), torch.arange(1)
    ids = torch.cartesian_prod(*axes)[None].to(latents.device)
    return Tokens(latents.flatten(2).permute(0, 2, 1), ids)


def encode(vae: Any, image: Image.Image) -> Tensor:
    """The latents (1, 128, h / 16, w / 16) of an RGB image whose sides are multiples of 16: the
    mode of the VAE's distribution, as its batch norm has it."""
    levels = torch.from_numpy(np.asarray(image, np.float32)[None] / 255.0).permute(0, 3, 1, 2)
    pixels = (2.0 * levels - 1.0).to(vae.device, vae.dtype)
    encoded: Tensor = vae.encode(pixels).latent_dist.mode()
    packed = F.pixel_unshuffle(encoded, 2)
    mean, deviation = _statistics(vae, packed)
    latents: Tensor = (packed - mean) / deviation
    if not latents.isfinite().all():
        raise InternalError("the VAE encoded a picture to values that are not finite")
    return latents


def decode(vae: Any, latents: Tensor, width: int, height: int) -> Image.Image:
    """The RGB image of clean latents (1, n, 128); raises InternalError if it is not finite."""
    rows, columns = height // MULTIPLE, width // MULTIPLE
    packed = latents.reshape(1, rows, columns, CHANNELS).permute(0, 3, 1, 2)
    decoded: Tensor = vae.decode(_unpacked(vae, packed), return_dict=False)[0][0]
    if not decoded.isfinite().all():
        raise InternalError(
            "the VAE decoded finite latents to values that are not finite, so there is no image: "
            "try another seed, or KLEIN_SPEED=eager"
        )
    levels = ((decoded * 0.5 + 0.5).clamp(0, 1).float() * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().cpu().numpy())


def _unpacked(vae: Any, packed: Tensor) -> Tensor:
    """(1, 32, 2h, 2w) for the VAE from (1, 128, h, w), its batch norm undone."""
    mean, deviation = _statistics(vae, packed)
    return F.pixel_shuffle(packed * deviation + mean, 2)


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (1, 128, 1, 1) of the VAE's batch norm over packed latents."""
    mean = vae.bn.running_mean.view(1, -1, 1, 1).to(like)
    variance = vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps
    return mean, variance.sqrt().to(like)
