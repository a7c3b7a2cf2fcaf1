"""Picture sizes in pixels: what the model takes, and the nearest such size to one asked for."""

MULTIPLE = 16
"""A token covers 16 by 16 pixels: the VAE's factor 8 times a 2 by 2 patch."""
SMALLEST = 64
LARGEST_SIDE = 4096
MAX_PIXELS = 4 * 1024 * 1024
MAX_ASPECT = 8.0


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
