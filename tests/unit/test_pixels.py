import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from klein import pixels
from klein.models import schedule, sizes
from klein.models.sizes import Size
from tests.support import pictures

sides = st.integers(64, 220)


def _random_mask(size: Size, seed: int, share: float) -> Image.Image:
    """Blobs, single pixels and stripes, as people draw them."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((rng.integers(1, 20), rng.integers(1, 20))) < share
    mask = Image.fromarray(coarse.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)
    mask.paste(255, (3, 5, 4, 6))
    return mask


@given(sides, sides, st.integers(0, 2**31), st.floats(0, 1), st.integers(0, 40), st.booleans())
def test_every_pixel_outside_the_mask_is_the_callers(
    width: int, height: int, seed: int, share: float, feather: int, crops: bool
) -> None:
    """Bit for bit, for 200 masks, sizes, feathers and crops; and the count counts just those."""
    original, mask = pictures.noise(width, height, seed), _random_mask((width, height), seed, share)
    box = pixels.crop_box(mask, seed % 30, None) if crops else (0, 0, width, height)
    size = sizes.shaped(box[2] - box[0], box[3] - box[1], 96 * 96)
    drawn = pictures.noise(*size, seed + 1)
    image, unchanged = pixels.repaint(original, mask, box, size, feather).put_back(drawn)
    outside = np.asarray(mask) == 0
    same = (np.asarray(image) == np.asarray(original)).all(axis=2)
    assert image.size == original.size
    assert same[outside].all()
    assert unchanged == np.count_nonzero(outside)


@given(sides, sides, st.integers(0, 2**31), st.floats(0, 1), st.integers(0, 40))
def test_the_mask_that_is_drawn_covers_what_is_put_back(
    width: int, height: int, seed: int, share: float, feather: int
) -> None:
    """A pixel that takes anything of the drawing lies where the drawing is new."""
    mask = _random_mask((width, height), seed, share)
    size = sizes.shaped(width, height, 96 * 96)
    made = pixels.repaint(Image.new("RGB", mask.size), mask, (0, 0, *mask.size), size, feather)
    back = made.mask.resize(mask.size, Image.Resampling.BILINEAR)
    assert set(made.mask.tobytes()) <= {0, 255}
    assert (np.asarray(back)[np.asarray(made.weights) > 0] > 0).all()
    assert ((np.asarray(made.weights) > 0) == (np.asarray(mask) > 0)).all()


def test_feather_rises_inside_the_mask() -> None:
    """One pixel deep it is faint, `feather` deep it is whole; without, whole everywhere."""
    weights = np.asarray(pixels.blend_weights(pictures.spot(100, 80, (20, 20, 80, 60)), 4))
    assert list(weights[40, 18:26]) == [0, 0, 51, 102, 153, 204, 255, 255]
    assert set(pixels.blend_weights(pictures.spot(9, 9, (2, 2, 7, 7)), 0).tobytes()) == {0, 255}


def test_feather_leaves_a_thin_mask_something() -> None:
    """A stripe of five pixels is repainted in its middle whatever the feather; and the edge of the
    picture is no edge of the mask."""
    stripe = pixels.blend_weights(pictures.spot(90, 70, (40, 0, 45, 70)), 200)
    assert np.asarray(stripe)[30, 38:47].tolist() == [0, 0, 128, 255, 255, 255, 128, 0, 0]
    assert np.asarray(stripe)[0, 42] == 255


@given(sides, sides, st.integers(0, 2**31), st.integers(0, 300), st.integers(1, 8))
def test_the_crop_holds_the_mask_and_can_be_drawn(
    width: int, height: int, seed: int, padding: int, ratio: int
) -> None:
    """Inside the picture, not under 64, not narrower than 8:1, whatever shape is asked for."""
    mask = _random_mask((width, height), seed, 0.05)
    inner = mask.getbbox() or (0, 0, 0, 0)
    for drawn in (None, (64 * ratio, 64), (64, 64 * ratio)):
        left, top, right, bottom = pixels.crop_box(mask, padding, drawn)
        assert 0 <= left <= max(0, inner[0] - padding)
        assert min(height, inner[3] + padding) <= bottom <= height
        assert min(right - left, bottom - top) >= 64
        assert max(right - left, bottom - top) <= 8 * min(right - left, bottom - top)
        assert sizes.fault(*sizes.shaped(right - left, bottom - top, 256**2)) is None


def test_a_crop_grows_to_the_shape_that_is_drawn() -> None:
    """About its middle, and into the picture where that lies at its edge."""
    mask = pictures.spot(1000, 800, (900, 100, 1000, 200))
    assert pixels.crop_box(mask, 0, None) == (900, 100, 1000, 200)
    assert pixels.crop_box(mask, 10, (1536, 768)) == (760, 90, 1000, 210)
    assert pixels.crop_box(mask, 10, (1024, 1088)) == (890, 90, 1000, 210)


def test_margins_repeat_the_edge() -> None:
    """And are what is repainted."""
    image = pictures.noise(70, 64)
    grown, mask = pixels.grow(image, 5, 0, 6, 7)
    assert grown.size == mask.size == (81, 71)
    assert grown.crop((5, 0, 75, 64)).tobytes() == image.tobytes()
    assert grown.getpixel((0, 3)) == image.getpixel((0, 3))
    assert grown.getpixel((40, 70)) == image.getpixel((35, 63))
    assert mask.tobytes().count(b"\0") == 70 * 64
    assert mask.crop((5, 0, 75, 64)).getextrema() == (0, 0)


def test_cover_crops_about_the_middle() -> None:
    """Without stretching: a square stays one."""
    image = pictures.spot(300, 100, (140, 40, 160, 60)).convert("RGB")
    assert pixels.cover(image, (200, 200)).getbbox() == pytest.approx((80, 80, 120, 120), abs=6)


@given(
    st.integers(64, 6000), st.integers(64, 6000), st.sampled_from([256**2, 1024**2, 1536 * 1024])
)
def test_any_shape_has_a_size(width: int, height: int, count: int) -> None:
    """One that can be drawn, of that shape but for rounding."""
    if max(width, height) > 8 * min(width, height):
        return
    size = sizes.shaped(width, height, count)
    assert sizes.fault(*size) is None
    assert size == (sizes.nearest(size[0]), sizes.nearest(size[1]))
    assert sizes.same_shape(size, (width, height))
    assert size[0] * size[1] == pytest.approx(count, rel=0.2)


@pytest.mark.parametrize(
    ("size", "most", "shrunk", "used"),
    [
        ((1024, 1024), 1024**2, (1024, 1024), (1024, 1024)),
        ((1000, 700), 1024**2, (1000, 700), (992, 688)),
        ((4032, 3024), 1024**2, (1182, 886), (1168, 880)),
        ((1024, 1024), 256**2, (256, 256), (256, 256)),
        ((64, 500), 4096, (22, 178), (16, 176)),
    ],
)
def test_reference_sizes(size: Size, most: int, shrunk: Size, used: Size) -> None:
    """Shrunk in its own shape, never enlarged, then multiples of 16."""
    assert sizes.reference_size(*size, most) == (shrunk, used)
    assert pixels.shrink_reference(Image.new("RGB", size), most).size == used


def test_reference_megapixels_follow_the_native_size() -> None:
    """1 is as much as the model draws; the least leaves a square of 64 on the smallest."""
    assert sizes.reference_pixels(1.0, 1024) == 1024**2
    assert sizes.reference_pixels(4.0, 1024) == 2048**2
    assert sizes.reference_pixels(0.0625, 256) == 64**2


@pytest.mark.parametrize(
    ("steps", "strength", "first"),
    [
        (28, None, 0),
        (28, 1.0, 0),
        (28, 0.8, 5),
        (10, 0.5, 5),
        (28, 0.01, 27),
        (28, 1e-20, 27),
        (1, 0.1, 0),
    ],
)
def test_the_first_step(steps: int, strength: float | None, first: int) -> None:
    """From noise without a start image; at least one step for any strength."""
    assert schedule.first_step(steps, strength) == first
