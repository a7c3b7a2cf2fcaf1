"""The text encoder in float8: what it does to embeddings and images, and how it is turned off."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity

from klein.inference.acceleration.ops import Rows, float8_copy, is_float8_only, round_rows, rows
from klein.inference.acceleration.text_encoder import Float8Linear
from klein.inference.pipeline import KleinPipeline
from klein.models.catalog import MODELS
from tests.model.conftest import drawer, load, pictures_of
from training.check import QUICK, wrong_colours

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


@torch.inference_mode()
def embeddings(pipe: KleinPipeline, prompt: str) -> torch.Tensor:
    """(tokens, 3 layers, width)."""
    encoded: torch.Tensor = pipe.prompts.encode(prompt, 128)[0]
    return encoded.reshape(len(encoded), 3, -1)


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


@pytest.mark.parametrize(("prompt", "wanted"), QUICK[:3])
def test_images_are_as_asked(prompt: str, wanted: dict[str, str], fast: KleinPipeline) -> None:
    """Every colour that the prompt names, as without float8."""
    made = drawer(fast)(prompt=prompt, num_inference_steps=6, guidance_scale=1)
    assert not wrong_colours(pictures_of(made)[0], wanted)


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
    assert isinstance(made, Rows)
    expected = (made.values.float() @ values.float().T * made.scale * scale.T).view(2, 5, -1)
    padded = Float8Linear(layer, torch.float32)
    assert all(side % 16 == 0 for side in float8_copy(padded)[0].shape)
    torch.testing.assert_close(padded(x), expected)
