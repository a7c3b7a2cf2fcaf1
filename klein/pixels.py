"""Pictures as pixels: shrinking references, reading masks, and putting what was repainted back.

Pure functions on Pillow images. A mask is a greyscale image of 0 (kept) and 255 (repainted).
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from klein.models import sizes
from klein.models.sizes import Size

if TYPE_CHECKING:
    from PIL.Image import Image

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; the last two lie outside."""


@dataclass(frozen=True, slots=True)
class Repaint:
    """How a drawn image goes back into the caller's picture.

    `original` is that picture in full (RGB, grown by its margins where it is extended) and `box`
    the part of it that is drawn. `mask` has the size that is drawn; `weights` has the original's
    size and says how much of the drawing each pixel takes: 0 outside the mask, up to 255 inside.
    """

    original: "Image"
    box: Box
    mask: "Image"
    weights: "Image"

    def put_back(self, drawn: "Image") -> tuple["Image", int]:
        """The original with `drawn` inside the mask, and how many pixels are the caller's own.

        Every pixel outside the mask is the original's, bit for bit; the count is a comparison.
        """
        left, top, right, bottom = self.box
        part = _resized(drawn.convert("RGB"), (right - left, bottom - top))
        image = self.original.copy()
        image.paste(part, (left, top), self.weights.crop(self.box))
        return image, _count_same(image, self.original, self.weights)


def repaint(original: "Image", mask: "Image", box: Box, size: Size, feather: int) -> Repaint:
    """What is needed to draw `box` of `original` at `size` and to put it back through `mask`."""
    return Repaint(original, box, drawn_mask(mask.crop(box), size), blend_weights(mask, feather))


def shrink_reference(image: "Image", most: int) -> "Image":
    """A reference at the size it is used at: Lanczos to at most `most` pixels, then a centre crop
    to multiples of 16, as diffusers."""
    size, (width, height) = sizes.reference_size(*image.size, most)
    image = _resized(image, size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def stretch(image: "Image", box: Box, size: Size) -> "Image":
    """`box` of the image at `size` (Lanczos)."""
    return _resized(image.crop(box), size)


def cover(image: "Image", size: Size) -> "Image":
    """The image at `size`: scaled until it covers that, and cropped about its centre."""
    from PIL import ImageOps
    from PIL.Image import Resampling

    return image if image.size == size else ImageOps.fit(image, size, Resampling.LANCZOS)


def grow(image: "Image", left: int, top: int, right: int, bottom: int) -> tuple["Image", "Image"]:
    """The image with margins that repeat its edges, and a mask of those margins."""
    import numpy as np
    from PIL import Image

    margins = ((top, bottom), (left, right))
    grown = np.pad(np.asarray(image), (*margins, (0, 0)), mode="edge")
    kept = np.zeros((image.height, image.width), np.uint8)
    mask = np.pad(kept, margins, constant_values=255)
    return Image.fromarray(grown), Image.fromarray(mask)


def crop_box(mask: "Image", padding: int, drawn: Size | None) -> Box:
    """The part of a picture to draw: its mask's bounds and `padding` pixels around them.

    It grows to sides of 64 and to 8:1, and to the shape of the size `drawn` if that is settled, as
    far as the picture goes. The mask has something to repaint.
    """
    left, top, right, bottom = mask.getbbox() or (0, 0, *mask.size)
    left, top = max(0, left - padding), max(0, top - padding)
    right, bottom = min(mask.width, right + padding), min(mask.height, bottom + padding)
    width, height = right - left, bottom - top
    width = max(width, sizes.SMALLEST, math.ceil(height / sizes.MAX_ASPECT))
    height = max(height, sizes.SMALLEST, math.ceil(width / sizes.MAX_ASPECT))
    if drawn is not None and not sizes.same_shape(drawn, (width, height)):
        ratio = drawn[0] / drawn[1]
        width, height = max(width, round(height * ratio)), max(height, round(width / ratio))
    left, right = _around(left, right, width, mask.width)
    top, bottom = _around(top, bottom, height, mask.height)
    return left, top, right, bottom


def drawn_mask(mask: "Image", size: Size) -> "Image":
    """The mask at the size that is drawn: 255 wherever a repainted pixel falls."""
    from PIL.Image import Resampling

    return mask.resize(size, Resampling.BOX).point(lambda value: 255 if value else 0)


def blend_weights(mask: "Image", feather: int) -> "Image":
    """0 outside the mask; inside it rises to 255 over `feather` pixels from the mask's edge.

    Where no pixel lies that deep, over half the depth there is. The picture's own edge is none.
    """
    import numpy as np
    from PIL import Image

    weights = Image.new("L", mask.size)
    left, top, right, bottom = mask.getbbox() or (0, 0, 1, 1)
    around = (
        max(0, left - 1),
        max(0, top - 1),
        min(mask.width, right + 1),
        min(mask.height, bottom + 1),
    )
    depth = _depth(np.asarray(mask.crop(around)) > 0)
    ramp = min(feather, int(depth.max()) // 2) + 1
    table = ((np.arange(ramp + 1) * 255 + ramp - 1) // ramp).astype(np.uint8)
    weights.paste(Image.fromarray(table[np.minimum(depth, ramp)]), around)
    return weights


def _depth(inside: Any) -> Any:
    """For each pixel of an (H, W) array of bool, the steps to the nearest that is not inside."""
    import numpy as np

    far = sum(inside.shape)
    depth = np.where(inside, far, 0).astype(np.int16)  # two sides stay far below 2¹⁵
    for axis in (0, 1):
        shape = [1, 1]
        shape[axis] = -1
        place = np.arange(inside.shape[axis], dtype=np.int16).reshape(shape)
        ahead = np.minimum.accumulate(depth - place, axis=axis) + place
        back = np.flip(np.minimum.accumulate(np.flip(depth + place, axis), axis=axis), axis) - place
        depth = np.minimum(ahead, back)
    return np.minimum(depth, far)


def _count_same(image: "Image", original: "Image", weights: "Image") -> int:
    """How many pixels of weight 0 are equal in both."""
    from PIL import ImageChops

    red, green, blue = ImageChops.difference(image, original).split()
    differs = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    outside = weights.point(lambda weight: 0 if weight else 255)
    return differs.histogram(outside)[0]


def _around(low: int, high: int, length: int, limit: int) -> tuple[int, int]:
    """`length` pixels about the middle of `low` to `high`, moved and cut to lie in 0 to `limit`."""
    length = min(length, limit)
    start = min(max(0, (low + high - length) // 2), limit - length)
    return start, start + length


def _resized(image: "Image", size: Size) -> "Image":
    from PIL.Image import Resampling

    return image if image.size == size else image.resize(size, Resampling.LANCZOS)
