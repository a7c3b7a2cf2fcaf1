"""Picture sizes in pixels: what the model takes, and the nearest such size to one asked for."""

import math

MULTIPLE = 16
"""A token covers 16 by 16 pixels: the VAE's factor 8 times a 2 by 2 patch."""
SMALLEST = 64
LARGEST_SIDE = 4096
MAX_PIXELS = 4 * 1024 * 1024
MAX_ASPECT = 8.0


Size = tuple[int, int]
"""Width and height in pixels."""


def tokens(width: int, height: int) -> int:
    """Image tokens of a picture of that size in pixels."""
    return (width // MULTIPLE) * (height // MULTIPLE)


def nearest(side: int) -> int:
    """The multiple of 16 nearest to `side`, halves rounded up."""
    return max(SMALLEST, (side + MULTIPLE // 2) // MULTIPLE * MULTIPLE)


def fault(width: int, height: int) -> str | None:
    """Why no picture of that size can be made, or None if one can."""
    if min(width, height) < SMALLEST:
        return f"{width}×{height} is too small: both sides are at least {SMALLEST}"
    if width * height > MAX_PIXELS:
        return (
            f"{width}×{height} is {width * height / 1024**2:.1f} megapixels: "
            f"at most {MAX_PIXELS // 1024**2} are possible, such as 2048×2048"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        return f"{width}×{height} is too narrow: sides are at most {MAX_ASPECT:g}:1"
    return None


def scale_to(width: int, height: int, native: int) -> tuple[int, int]:
    """A size meant for a native size of 1024, for a model of native size `native`."""
    return nearest(width * native // 1024), nearest(height * native // 1024)


def shaped(width: int, height: int, pixels: int) -> Size:
    """The size to draw at that has the shape width : height and about `pixels` pixels."""
    scale = math.sqrt(pixels / (width * height))
    size = nearest(round(width * scale)), nearest(round(height * scale))
    least = math.ceil(max(size) / MAX_ASPECT / MULTIPLE) * MULTIPLE
    return max(size[0], least), max(size[1], least)


def same_shape(size: Size, shape: Size) -> bool:
    """Whether rounding to multiples of 16 is all that tells `size` from the shape it is for."""
    low = max((side - MULTIPLE) / long for side, long in zip(size, shape, strict=True))
    high = min((side + MULTIPLE) / long for side, long in zip(size, shape, strict=True))
    return low <= high


def reference_pixels(megapixels: float, native: int) -> int:
    """The most pixels of a reference: megapixels (1024²) for a native size of 1024, and the same
    share of the native area for any other."""
    return round(megapixels * native**2)


def reference_size(width: int, height: int, most: int) -> tuple[Size, Size]:
    """The size that a reference is shrunk to, and the one it is then cropped to.

    As diffusers 0.42.1's Flux2KleinPipeline: at most `most` pixels in its own shape, then both
    sides down to a multiple of 16. A smaller picture is not enlarged.
    """
    if width * height > most:
        scale = math.sqrt(most / (width * height))
        width, height = int(width * scale), int(height * scale)
    cropped = width // MULTIPLE * MULTIPLE, height // MULTIPLE * MULTIPLE
    return (width, height), cropped
