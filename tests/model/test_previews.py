"""Previews of a real VAE: near to the image, in order, and without a trace in it."""

import numpy as np
import pytest
from PIL import Image

from klein.core import Preview, PreviewRequest
from klein.inference.pipeline import KleinPipeline
from tests.model.conftest import context_of, load, make_job

PROMPT = "a smiling woman with red hair and a green hat in front of a blue background"


@pytest.fixture(scope="module")
def nano() -> KleinPipeline:
    return load("nano")


def drawn(pipe: KleinPipeline, **wanted: int) -> tuple[Image.Image, list[Preview]]:
    """An image in 12 steps, and the previews told on the way."""
    told: list[Preview] = []
    context = context_of(previews=PreviewRequest(told.append, **wanted))
    job = make_job(pipe, context, prompt=PROMPT, num_inference_steps=12)
    return pipe.generate(job).images[0].image, told


def apart(preview: Image.Image, image: Image.Image) -> float:
    """Mean difference of 255 at the preview's size."""
    small = image.resize(preview.size, Image.Resampling.BOX)
    return float(np.abs(np.asarray(preview, float) - np.asarray(small, float)).mean())


def test_small_previews_come_to_look_like_the_image(nano: KleinPipeline) -> None:
    """An eighth of its size, every third step but the last, each nearer than the one before."""
    image, told = drawn(nano, every=3)
    assert [(p.step, p.decoded, p.picture.size) for p in told] == [
        (step, False, (32, 32)) for step in (3, 6, 9)
    ]
    distances = [apart(p.picture, image) for p in told]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 20


def test_decoded_previews_are_the_vaes(nano: KleinPipeline) -> None:
    """Of the whole size, evenly spread, the last all but the image."""
    image, told = drawn(nano, decoded=3)
    assert [(p.step, p.decoded, p.picture.size) for p in told] == [
        (step, True, image.size) for step in (3, 6, 9)
    ]
    assert apart(told[-1].picture, image) < 4


def test_previews_change_nothing(nano: KleinPipeline) -> None:
    """The image is the same with and without, bit for bit."""
    plain = nano.generate(make_job(nano, prompt=PROMPT, num_inference_steps=12)).images[0].image
    assert drawn(nano, every=1, decoded=2)[0].tobytes() == plain.tobytes()
