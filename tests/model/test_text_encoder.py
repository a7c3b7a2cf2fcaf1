"""The text encoder in float8: what it does to embeddings and images, and how it is turned off."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from klein.inference.acceleration.ops import float8_copy, is_float8_only, round_rows, rows
from klein.inference.acceleration.text_encoder import Float8Linear
from klein.inference.pipeline import KleinPipeline
from klein.models.catalog import MODELS
from tests.model.conftest import drawer, load

LORAS = Path("klein/nano/loras")
PROMPTS = (
    "a smiling woman with red hair, green eyes and a blue hat, on a yellow background",
    "a portrait",
    "An old lady with white hair in a bun and freckles. She wears a purple sweater.",
)


@pytest.fixture(scope="module")
def fast() -> KleinPipeline:
    return load("nano", LORAS, KLEIN_SPEED="fast")


@pytest.fixture(scope="module")
def full() -> KleinPipeline:
    """The same with the text encoder as it is."""
    return load("nano", LORAS, KLEIN_SPEED="fast", KLEIN_TEXT_ENCODER="bfloat16")


@pytest.fixture(scope="module")
def eager() -> KleinPipeline:
    return load("nano", LORAS)


def pixels(pipe: KleinPipeline) -> np.ndarray:
    """Three images of one prompt."""
    made = drawer(pipe)(prompt=PROMPTS[0], num_inference_steps=6, num_images=3)
    return np.stack([np.asarray(one.image, dtype=np.float64) for one in made.images])


@torch.inference_mode()
def embeddings(pipe: KleinPipeline, prompt: str) -> torch.Tensor:
    """(tokens, 3 layers, width)."""
    return pipe.prompts.encode(prompt, 128)[0].unflatten(-1, (3, -1))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_embeddings_keep_their_direction(
    prompt: str, fast: KleinPipeline, full: KleinPipeline
) -> None:
    """In every layer and at every token, padding included; and they are not the same."""
    alike = cosine_similarity(embeddings(fast, prompt), embeddings(full, prompt), dim=-1)
    print(f"mean {alike.mean():.4f}, least {alike.min():.4f}")
    assert alike.mean() > 0.998
    assert alike.min() > 0.985
    assert alike.mean() < 0.99999


def test_it_changes_images_no_more_than_the_transformer_in_float8_does(
    fast: KleinPipeline, full: KleinPipeline, eager: KleinPipeline
) -> None:
    """The setting turns the one off and leaves the other; both are no worse than one."""
    drawn = pixels(full)
    text, transformer = (np.square(drawn - pixels(x)).mean() for x in (fast, eager))
    both = np.square(pixels(fast) - pixels(eager)).mean()
    print(f"text encoder {text:.2f}, transformer {transformer:.2f}, both {both:.2f}")
    assert 0 < text < 1.25 * transformer
    assert both < 1.5 * transformer


def test_the_settings_text_encoder_is_the_files(full: KleinPipeline, eager: KleinPipeline) -> None:
    """Without float8 embeddings are those of every other tier, bit for bit."""
    assert torch.equal(embeddings(full, PROMPTS[0]), embeddings(eager, PROMPTS[0]))


def test_only_float8_is_kept(fast: KleinPipeline) -> None:
    """Every linear of the layers that are read, as the table of models counts them."""
    layers = [x for x in fast.parts.text_encoder.modules() if isinstance(x, Float8Linear)]
    assert all(map(is_float8_only, layers))
    assert len(layers) == 27 * 7
    numbers = sum(layer.in_features * layer.out_features for layer in layers)
    assert numbers == MODELS["nano"].text_linears


@pytest.mark.parametrize("sides", [(64, 64), (72, 64), (64, 72), (8, 24)])
def test_padding_changes_nothing(sides: tuple[int, int]) -> None:
    """A weight whose sides no GPU multiplies is padded, and its product stays what it was."""
    torch.manual_seed(1)
    layer = torch.nn.Linear(*sides, bias=False).requires_grad_(False)
    x = torch.randn(2, 5, sides[0])
    values, scale = round_rows(layer.weight)
    made = rows(x, 0, 5, True)
    expected = (made.values.float() @ values.float().T * made.scale * scale.T).view(2, 5, -1)
    padded = Float8Linear(layer, torch.float32)
    assert all(side % 16 == 0 for side in float8_copy(padded)[0].shape)
    torch.testing.assert_close(padded(x), expected)
