from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import ImageChops

from klein.core import GenerationResult, Progress
from klein.errors import Cancelled, DeadlineExceeded, ModelUnavailable, OutOfMemory
from klein.inference.pipeline import KleinPipeline
from klein.models import schedule
from tests.model.conftest import Draw, context_of, drawer, load, make_job
from tests.model.stock import stock
from tests.support import tiny


def _same(a: GenerationResult, b: GenerationResult) -> bool:
    return [x.image.tobytes() for x in a.images] == [x.image.tobytes() for x in b.images]


def test_the_text_encoder_is_cut_bit_identically(
    tiny_folder: Path, tiny_pipe: KleinPipeline
) -> None:
    """27 layers and no head are left, and every state that is read is the same."""
    whole = stock(tiny_folder)
    assert len(whole.text_encoder.model.layers) == 28
    assert len(tiny_pipe.parts.text_encoder.model.layers) == 27
    for text in ("", "a portrait of a woman"):
        expected = whole.encode_prompt(text, max_sequence_length=64)[0]
        with torch.inference_mode():
            assert torch.equal(tiny_pipe.prompts.encode(text, 64), expected)


@pytest.mark.parametrize(("guidance", "forwards"), [(2.5, 6), (1.0, 3), (0.0, 3)])
def test_forwards_are_counted(draw: Draw, guidance: float, forwards: int) -> None:
    """Two a step with guidance, one without."""
    assert draw(guidance_scale=guidance, num_inference_steps=3).forwards == forwards


def test_same_request_same_picture_in_any_order(draw: Draw) -> None:
    """Alone, after other jobs, or as part of a batch."""
    alone = draw(seed=5)
    draw(seed=9, prompt="something else", schedule="ai_toolkit", guidance_scale=1)
    batch = draw(seed=4, num_images=3)
    assert _same(alone, draw(seed=5))
    assert batch.images[1].seed == 5
    assert batch.images[1].image.tobytes() == alone.images[0].image.tobytes()
    assert batch.forwards == 3 * alone.forwards


def test_seeds_go_round(draw: Draw) -> None:
    """After the largest comes 0, and both can be drawn alone."""
    batch = draw(seed=2**32 - 1, num_images=2)
    assert [one.seed for one in batch.images] == [2**32 - 1, 0]
    assert batch.images[1].image.tobytes() == draw(seed=0).images[0].image.tobytes()


@pytest.mark.parametrize("name", [*schedule.SCHEDULES, 0.5, 2.0])
def test_the_run_follows_its_schedule(draw: Draw, name: str | float) -> None:
    """The sigmas of the run are those of the formula; another mu is another picture."""
    result = draw(schedule=name, num_inference_steps=4)
    mu = schedule.mu_of(name, 16, 4)
    assert result.mu == mu
    assert result.sigmas == pytest.approx(schedule.sigmas(mu, 4), abs=1e-5)
    assert _same(result, draw(num_inference_steps=4)) == (name == "bfl")


def test_a_long_prompt_says_where_it_was_cut(draw: Draw) -> None:
    """The encoder would cut it in silence."""
    result = draw(prompt="word " * 40, negative_prompt="x " * 60)
    told = " ".join(result.warnings)
    assert "prompt was cut: it has" in told
    assert "64 are read" in told
    assert "negative_prompt was cut" in told
    assert not draw(prompt="short").warnings


def test_cancel_and_deadline_act_within_a_step(tiny_pipe: KleinPipeline, draw: Draw) -> None:
    """And the next job is bit-identical to one before."""
    before = draw()
    seen: list[int] = []

    def on_progress(progress: Progress) -> None:
        seen.append(progress.step)
        if progress.step == 2:
            context.cancel()

    context = context_of(on_progress=on_progress)
    with pytest.raises(Cancelled):
        draw(make_job(tiny_pipe, context, num_inference_steps=20, schedule="linear"))
    assert seen == [1, 2]
    with pytest.raises(DeadlineExceeded):
        draw(make_job(tiny_pipe, context_of(0.2), num_inference_steps=100))
    assert _same(before, draw())


def test_out_of_memory_is_tried_once_more_with_less(tiny_pipe: KleinPipeline, draw: Draw) -> None:
    """Once more in tiles, and the result says so; a second time it is an error, and forgotten."""
    before, retries = draw(), tiny_pipe.stats().memory_retries
    tiled: list[bool] = []
    bursts = 1

    def burst(_: Progress) -> None:
        tiled.append(tiny_pipe.parts.vae.use_tiling)
        if len(tiled) <= bursts:
            raise torch.OutOfMemoryError("CUDA out of memory")

    again = draw(make_job(tiny_pipe, context_of(on_progress=burst)))
    assert again.images[0].image.tobytes() == before.images[0].image.tobytes()
    assert any("GPU memory ran out: drawn again" in warning for warning in again.warnings)
    assert tiled == [False, True, True]
    assert tiny_pipe.stats().memory_retries == retries + 1
    tiled.clear()
    bursts = 2
    with pytest.raises(OutOfMemory, match=r"64×64 did not fit .* twice: ask"):
        draw(make_job(tiny_pipe, context_of(on_progress=burst)))
    assert tiled == [False, True]
    after = draw()
    assert _same(before, after)
    assert not after.warnings


def test_tiling_is_told(tiny_folder: Path) -> None:
    """It changes pixels, so the result says that it was used: above the tile size only."""
    tiled = drawer(load(tiny_folder, KLEIN_VAE_TILING="on"))
    assert not tiled(width=128, height=128).warnings
    big = tiled(width=320, height=256)
    assert any("decoded in tiles" in warning for warning in big.warnings)
    assert big.images[0].image.size == (320, 256)


def test_a_distilled_model_draws_without_guidance(tmp_path: Path) -> None:
    """One forward a step, its own number of steps, and a guidance scale is told to be void."""
    pipe = load(tiny.save(tmp_path / "distilled", distilled=True))
    result = drawer(pipe)(num_inference_steps=None, guidance_scale=4)
    assert (result.forwards, result.params.guidance_scale) == (4, 1.0)
    assert any("distilled" in warning for warning in result.warnings)


def test_other_sizes_and_shapes(draw: Draw) -> None:
    """Portrait and landscape come out as asked."""
    for width, height in ((64, 128), (160, 80)):
        assert draw(width=width, height=height).images[0].image.size == (width, height)


def test_damaged_weights_are_said(tmp_path: Path) -> None:
    """One sentence, before the service says it is ready."""
    folder = tiny.save(tmp_path / "broken")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"short")
    with pytest.raises(ModelUnavailable, match="could not be loaded"):
        load(folder)


def test_timings_cover_the_job(draw: Draw) -> None:
    """Every stage is there and they add up to the total."""
    timings = asdict(draw(num_images=2).timings)
    total = timings.pop("total")
    assert set(timings) == {"fetch", "queue", "lora", "text", "encode", "denoise", "decode"}
    assert all(seconds > 0 for seconds in timings.values())
    assert sum(timings.values()) == pytest.approx(total, abs=0.2)


def test_pictures_are_not_empty(draw: Draw) -> None:
    """Two seeds differ visibly even with random weights."""
    a, b = draw(seed=1).images[0].image, draw(seed=2).images[0].image
    assert ImageChops.difference(a, b).getbbox() is not None
