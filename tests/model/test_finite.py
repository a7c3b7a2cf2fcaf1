"""What is not finite is an error that says which, never an image, and leaves nothing behind."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from klein.core import PreviewRequest
from klein.errors import InternalError, LoraError
from klein.inference.pipeline import KleinPipeline
from tests import loras
from tests.model.conftest import Draw, context_of, make_job
from tests.support import tiny

SHAPES = loras.layers(tiny.HIDDEN)
LAYER = "single_blocks.0.linear2"
NAN = float("nan")


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(draw: Draw) -> Iterator[None]:
    """The image after each test is the one before it, byte for byte."""
    before = draw().images[0].image.tobytes()
    yield
    after = draw()
    assert after.images[0].image.tobytes() == before
    assert not after.warnings


def _lora(change: Callable[[dict[str, loras.Array]], object]) -> dict[str, loras.Array]:
    tensors, _ = loras.ai_toolkit(SHAPES, rank=4)
    change(tensors)
    return tensors


def _set(part: str, value: float) -> Callable[[dict[str, loras.Array]], object]:
    def change(tensors: dict[str, loras.Array]) -> None:
        tensors[f"diffusion_model.{LAYER}.{part}"][0, 0] = value

    return change


def _overflow(tensors: dict[str, loras.Array]) -> None:
    """Factors that are finite, and their product that is not."""
    for part in ("lora_A.weight", "lora_B.weight"):
        tensors[f"diffusion_model.{LAYER}.{part}"][:] = 1e30


DAMAGED = {
    "nan in A": (_set("lora_A.weight", NAN), f"{LAYER}.lora_A.weight' has NaN or infinity"),
    "infinity in B": (_set("lora_B.weight", np.inf), f"{LAYER}.lora_B.weight' has NaN or infinity"),
    "product": (_overflow, "its weight changes are not finite"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_lora_that_is_not_finite(name: str, draw: Draw, lora_folder: Path) -> None:
    """`fail` refuses with the tensor's name; `continue` draws with the other LoRA only."""
    change, says = DAMAGED[name]
    loras.write(lora_folder / "damaged.safetensors", _lora(change))
    loras.write(lora_folder / "sound.safetensors", loras.ai_toolkit(SHAPES, seed=9)[0])
    both = [{"path": "damaged.safetensors"}, {"path": "sound.safetensors"}]
    with pytest.raises(LoraError) as caught:
        draw(loras=both, lora_error="fail")
    assert says in str(caught.value)
    result = draw(loras=both, lora_error="continue")
    assert [report.applied for report in result.loras] == [False, True]
    assert any("DRAWN WITHOUT A LORA" in each and says in each for each in result.warnings)
    alone = draw(loras=both[1:])
    assert result.images[0].image.tobytes() == alone.images[0].image.tobytes()


def test_a_lora_that_does_nothing(draw: Draw, lora_folder: Path) -> None:
    """All zeros, or a scale of 0: the image without it, and a warning that says why."""
    loras.write(lora_folder / "zero.safetensors", _lora(_clear))
    loras.write(lora_folder / "sound.safetensors", loras.ai_toolkit(SHAPES, seed=9)[0])
    plain = draw().images[0].image.tobytes()
    for lora, why in (
        ({"path": "zero.safetensors"}, "it is zero everywhere"),
        ({"path": "sound.safetensors", "scale": 0}, "its scale is 0"),
    ):
        result = draw(loras=[lora], lora_error="fail")
        assert result.images[0].image.tobytes() == plain
        assert result.warnings == (f"LoRA {lora['path']!r} changes nothing: {why}",)


def _clear(tensors: dict[str, loras.Array]) -> None:
    for tensor in tensors.values():
        tensor[:] = 0


@contextmanager
def _broken(weight: Tensor, value: float) -> Iterator[None]:
    """One number of `weight` is `value` for a while."""
    kept = weight.data.clone()
    weight.data.view(-1)[0] = value
    try:
        yield
    finally:
        weight.data.copy_(kept)


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_a_step_that_is_not_finite(value: float, draw: Draw, tiny_pipe: KleinPipeline) -> None:
    """The first such step is named."""
    weight = tiny_pipe.parts.transformer.proj_out.weight
    with (
        _broken(weight, value),
        pytest.raises(InternalError, match="step 1 of 3 gave values that are not finite"),
    ):
        draw(num_inference_steps=3)


def test_a_preview_that_is_not_finite(draw: Draw, tiny_pipe: KleinPipeline) -> None:
    """It is no image either, and the decoder is not blamed for the latents."""
    told: list[object] = []
    context = context_of(previews=PreviewRequest(told.append, every=1, decoded=1))
    job = make_job(tiny_pipe, context, num_inference_steps=4)
    with (
        _broken(tiny_pipe.parts.transformer.proj_out.weight, NAN),
        pytest.raises(InternalError, match="step 1 of 4 gave values that are not finite"),
    ):
        draw(job)
    assert not told


def test_a_decoder_that_is_not_finite(draw: Draw, tiny_pipe: KleinPipeline) -> None:
    """The latents were; the error says so."""
    with (
        _broken(tiny_pipe.parts.vae.decoder.conv_out.bias, NAN),
        pytest.raises(InternalError, match="decoded finite latents to values that are not finite"),
    ):
        draw()


def test_an_encoder_that_is_not_finite(draw: Draw, tiny_pipe: KleinPipeline) -> None:
    """A caller's picture that comes to nothing is named, and not remembered."""
    from tests.model.test_editing import picture, sent

    values = {"images": [sent(picture(77, 64, 64))]}
    with (
        _broken(tiny_pipe.parts.vae.encoder.conv_in.bias, NAN),
        pytest.raises(InternalError, match="the VAE encoded a picture to values"),
    ):
        draw(**values)
    assert draw(**values).images


def test_a_text_that_is_not_finite(draw: Draw, tiny_pipe: KleinPipeline) -> None:
    """Embeddings are checked before the first step, and not remembered."""
    embeddings = tiny_pipe.parts.text_encoder.model.embed_tokens.weight
    kept = embeddings.data.clone()
    embeddings.data.fill_(NAN)
    try:
        with pytest.raises(InternalError, match="the text encoder gave values"):
            draw(prompt="never asked before")
    finally:
        embeddings.data.copy_(kept)
    assert draw(prompt="never asked before").images
