import random

import numpy as np
import pytest
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

from klein import pixels
from tests.support import pictures

PROCESSOR = Flux2ImageProcessor(vae_scale_factor=16)
_RANDOM = random.Random(0)
SIZES = [(_RANDOM.randint(64, 1700), _RANDOM.randint(212, 1500)) for _ in range(12)]


@pytest.mark.parametrize("size", [*SIZES, (1024, 1024), (1024, 1040), (4032, 1000), (65, 64)])
def test_references_are_diffusers_own_pixel_for_pixel(size: tuple[int, int]) -> None:
    """Size, resampling and crop, as Flux2KleinPipeline prepares `image`."""
    image = pictures.noise(*size)
    resized = PROCESSOR.check_image_input(image)
    if size[0] * size[1] > 1024 * 1024:
        resized = PROCESSOR._resize_to_target_area(resized, 1024 * 1024)
    width, height = (side // 16 * 16 for side in resized.size)
    tensor = PROCESSOR.preprocess(resized, height=height, width=width, resize_mode="crop")[0]
    made = pixels.shrink_reference(image, 1024 * 1024)
    expected = ((tensor.permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8)
    assert made.size == (width, height)
    assert np.array_equal(np.asarray(made), expected)
