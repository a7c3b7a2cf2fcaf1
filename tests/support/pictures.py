"""Pictures as callers send them."""

import base64
import io
from typing import Any

from PIL import Image


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """RGB pixels that no two neighbours share."""
    import numpy as np

    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def data(image: Image.Image, fmt: str = "PNG", **options: Any) -> bytes:
    """The picture as a file."""
    out = io.BytesIO()
    image.save(out, fmt, **options)
    return out.getvalue()


def text(image: Image.Image, fmt: str = "PNG", **options: Any) -> str:
    """The picture as base64."""
    return base64.b64encode(data(image, fmt, **options)).decode()


def spot(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    """A mask that is white in `box`."""
    mask = Image.new("L", (width, height))
    mask.paste(255, box)
    return mask
