"""Control within a request: its tier, scales over the run, block weights; on small models."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from klein.core import GenerationResult, Job, Progress
from klein.errors import Cancelled, LoraUnavailable, OutOfMemory
from klein.inference.pipeline import KleinPipeline
from klein.lora.file import LoraFile
from klein.models.layers import modules_by_layer
from klein.models.speed import STEP_SKIPPING, TIERS
from tests.model.conftest import Draw, context_of, drawer, load, make_job, planned, with_loras
from tests.support import loras, tiny

LORAS = Path("klein/nano/loras")
ZIBBO, PIXELKIN = "zibbo.safetensors", "pixelkin.safetensors"
SHAPES = loras.layers(tiny.HIDDEN)
A, B = "control-a.safetensors", "control-b.safetensors"


@pytest.fixture(scope="module", autouse=True)
def _files(lora_folder: Path) -> None:
    for seed, name in ((1, A), (500, B)):
        loras.write(lora_folder / name, *loras.ai_toolkit(SHAPES, seed=seed))


def _bytes(result: GenerationResult) -> list[bytes]:
    return [each.image.tobytes() for each in result.images]


# -- a tier for one request ------------------------------------------------------------------------


def _drawn(pipe: KleinPipeline, speed: str, **values: Any) -> GenerationResult:
    job = make_job(
        pipe,
        prompt="zibbo",
        num_inference_steps=15,
        width=64,
        height=64,
        guidance_scale=1,
        **values,
    )
    return pipe.generate(replace(job, params=replace(job.params, speed=speed)))


@pytest.mark.long
def test_a_request_draws_as_a_server_of_its_tier() -> None:
    """One that holds float8 copies and originals serves all tiers in any order, one without float8
    those without it, and LoRAs come and go: bit for bit."""
    zibbo: dict[str, Any] = {"loras": [{"path": ZIBBO}]}

    def serve(tier: str) -> KleinPipeline:
        """With the text encoder in full: in float8 there is no way back."""
        return load("nano", LORAS, KLEIN_SPEED=tier, KLEIN_TEXT_ENCODER="bfloat16")

    expected = {tier: _bytes(_drawn(serve(tier), "", **zibbo)) for tier in TIERS}
    assert len({image for (image,) in expected.values()}) >= 4
    for server, order in (("fast", ("fast", *reversed(TIERS))), ("exact", list(TIERS)[:4])):
        pipe = serve(server)
        before = _bytes(_drawn(pipe, server))
        assert set(pipe.info.speeds) == set(order)
        for tier in order:
            made = _drawn(pipe, tier, **zibbo)
            assert _bytes(made) == expected[tier], (server, tier)
            options = tuple(name for name in TIERS[tier].options if name != "float8_text")
            assert (made.model.speed, made.model.speed_options) == (tier, options)
            skips = "step_skipping" in TIERS[tier].options
            assert made.forwards == (STEP_SKIPPING.computed(15) if skips else 15)
        assert _bytes(_drawn(pipe, server)) == before


# -- a scale over the run --------------------------------------------------------------------------


class _Relay:
    """Forwards of the steps before `change` go to one model, the others to another."""

    def __init__(self, first: Any, second: Any, change: int) -> None:
        self.models, self.change, self.calls = (first, second), change, 0

    def __call__(self, **values: Any) -> Any:
        self.calls += 1
        return self.models[self.calls > self.change](**values)


@pytest.mark.parametrize(("before", "after"), [(0.0, 1.0), (1.0, 0.0), (-0.5, 0.7)])
def test_each_piece_draws_as_a_scale_of_its_own(
    before: float, after: float, draw: Draw, tiny_folder: Path, lora_folder: Path
) -> None:
    """The steps before the point are those of one model, the others those of another."""
    pipes = [load(tiny_folder, lora_folder) for _ in range(2)]
    for pipe, scale in zip(pipes, (before, after), strict=True):
        drawer(pipe)(loras=[{"path": A, "scale": scale}], num_inference_steps=1)
    relay = _Relay(pipes[0].parts.denoiser, pipes[1].parts.denoiser, change=3)
    parts = replace(pipes[0].parts, denoiser=relay)
    both = with_loras(KleinPipeline(parts, *planned(tiny_folder), ""), lora_folder)
    values = {"num_inference_steps": 5, "guidance_scale": 1}
    expected = drawer(both)(**values)
    draw()
    made = draw(**values, loras=[{"path": A, "scale": [[0, before], [0.6, after]]}])
    assert _bytes(made) == _bytes(expected)
    (report,) = made.loras
    assert (report.scale, report.merges) == (((0.0, before), (0.6, after)), 2)
    assert report.seconds is not None
    assert made.timings.lora >= report.seconds > 0
    largest = before if abs(before) > abs(after) else after
    (alone,) = draw(loras=[{"path": A, "scale": largest}]).loras
    assert report.relative_change == alone.relative_change


RUN: dict[str, Any] = {
    "num_inference_steps": 6,
    "loras": [
        {"path": A, "scale": [[0, 0], [0.5, 1]]},
        {"path": B, "scale": [[0, -0.5], [0.33, 0.25]], "block_weights": {"*.ff.*": 0}},
    ],
}


@pytest.mark.parametrize("sampler", ["euler", "ab2", "lcm"])
def test_images_of_one_request_are_those_drawn_alone(draw: Draw, sampler: str) -> None:
    """Each begins with the first piece again; afterwards the weights are the model's."""
    base = draw()
    together = draw(**RUN, num_images=3, sampler=sampler)
    alone = [draw(**RUN, seed=seed, sampler=sampler) for seed in (1, 2, 3)]
    assert _bytes(together) == [image for one in alone for image in _bytes(one)]
    assert [one.merges for one in together.loras] == [9, 9]
    assert _bytes(draw()) == _bytes(base)
    constant = draw(loras=[{"path": A, "scale": [[0, 0.5], [0.5, 0.5]]}])
    assert _bytes(constant) == _bytes(draw(loras=[{"path": A, "scale": 0.5}]))


def test_few_steps_say_what_never_acts(draw: Draw) -> None:
    """One step has one scale."""
    result = draw(num_inference_steps=1, loras=[{"path": A, "scale": [[0, 0], [0.5, 1]]}])
    assert _bytes(result) == _bytes(draw(num_inference_steps=1))
    nothing, never = result.warnings
    assert nothing == f"LoRA {A!r} changes nothing: its scale is 0 in every step"
    assert "acts in no step at 1, its scale from 0.5 on: 1 steps are too few" in never


def test_a_run_from_a_start_image_is_counted_from_its_start(draw: Draw) -> None:
    """Half of the steps that are drawn, not of those that strength leaves out."""
    picture = draw(seed=9)
    lora = {"path": A, "scale": [[0, 0], [0.5, 1]]}
    job = {"init_image": tiny_png(picture), "strength": 0.5, "num_inference_steps": 8}
    made = draw(**job, loras=[lora])
    assert len(made.sigmas) == 4
    assert made.loras[0].merges >= 1
    moved = draw(**job, loras=[{"path": A, "scale": [[0, 0], [0.25, 1]]}])
    assert len({*_bytes(made), *_bytes(moved), *_bytes(draw(**job))}) == 3


def tiny_png(result: GenerationResult) -> str:
    import base64
    import io

    buffer = io.BytesIO()
    result.images[0].image.save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


class _Tensors(Mapping[str, str]):
    """The tensors of a patch; `before` is called each time that a merge asks for them."""

    def __init__(self, tensors: Mapping[str, str], before: Any) -> None:
        self._tensors, self._before = tensors, before

    def __getitem__(self, part: str) -> str:
        return self._tensors[part]

    def __iter__(self) -> Iterator[str]:
        self._before()
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _watched(job: Job, before: Any) -> Job:
    """`job`, with `before` called in each merge, half-way through its first LoRA."""
    file, *others = job.loras
    assert isinstance(file, LoraFile)
    patches = list(file.patches)
    patches[2] = replace(patches[2], tensors=_Tensors(patches[2].tensors, before))
    return replace(job, loras=(replace(file, patches=tuple(patches)), *others))


def test_memory_that_runs_out_in_a_later_merge(draw: Draw, tiny_pipe: KleinPipeline) -> None:
    """Once: the image is drawn again from its start, the same. Twice: the LoRA is what failed, and
    the next image is clean."""
    base, expected = _bytes(draw()), _bytes(draw(**RUN))

    def failing(at: tuple[int, ...], **values: Any) -> Job:
        merges = iter(range(100))

        def before() -> None:
            if next(merges) in at:
                raise torch.OutOfMemoryError

        return _watched(make_job(tiny_pipe, **RUN, **values), before)

    once = draw(failing((2,)))
    assert _bytes(once) == expected
    assert any("GPU memory ran out" in warning for warning in once.warnings)
    with pytest.raises((LoraUnavailable, OutOfMemory), match="did not fit into GPU memory, twice"):
        draw(failing((1, 3), lora_error="fail"))
    twice = draw(failing((1, 3)))
    assert any("DRAWN WITHOUT A LORA" in warning for warning in twice.warnings)
    assert [one.applied for one in twice.loras] == [False, True]
    assert _bytes(draw()) == base
    assert _bytes(draw(**RUN)) == expected


def test_cancelling_in_a_later_merge(draw: Draw, tiny_pipe: KleinPipeline) -> None:
    """The step after it is the last, and the next images are those of any other day."""
    base, expected = _bytes(draw()), _bytes(draw(**RUN))
    steps: list[int] = []
    context = context_of(on_progress=lambda progress: steps.append(progress.step))

    def before() -> None:
        if steps:
            context.cancel()

    job = _watched(make_job(tiny_pipe, context, **RUN), before)
    with pytest.raises(Cancelled):
        draw(job)
    assert steps == [1, 2, 3]
    assert _bytes(draw(**RUN)) == expected
    assert _bytes(draw()) == base


def test_progress_counts_steps_and_not_merges(draw: Draw, tiny_pipe: KleinPipeline) -> None:
    """A caller sees the steps that it asked for."""
    seen: list[Progress] = []
    draw(make_job(tiny_pipe, context_of(on_progress=seen.append), **RUN))
    assert [(each.step, each.steps) for each in seen] == [(n, 6) for n in range(1, 7)]


# -- block weights ---------------------------------------------------------------------------------


def test_a_weight_is_a_lora_with_those_layers_scaled(draw: Draw, lora_folder: Path) -> None:
    """0 is a file without the layers, 0.5 one with half of what they change, fused q, k and v
    included; the report counts layers, and what decided for none is said."""
    tensors, metadata = loras.ai_toolkit(SHAPES, seed=1)
    made = {}
    for name, tensor in tensors.items():
        layer = name.removeprefix("diffusion_model.").rsplit(".lora_", 1)[0]
        if layer.startswith("single_blocks.1"):
            continue
        half = layer.startswith("double_blocks.0") and ".lora_B." in name
        made[name] = tensor * 0.5 if half else tensor
    loras.write(lora_folder / "scaled.safetensors", made, metadata)
    weights = {"transformer_blocks.0": 0.5, "single_transformer_blocks.1.*": 0, "x_embedder": 2}
    result = draw(loras=[{"path": A, "block_weights": weights}])
    assert _bytes(result) == _bytes(draw(loras=[{"path": "scaled.safetensors"}]))
    counted = {
        pattern: sum(
            name.startswith(pattern.removesuffix("*"))
            for layer in SHAPES
            for name in modules_by_layer()[layer]
        )
        for pattern in weights
    }
    assert result.loras[0].block_layers == counted
    assert min(list(counted.values())[:2]) > 1
    (said,) = result.warnings
    assert said == (
        f"block_weights of LoRA {A!r}: 'x_embedder' decides for none of its layers, which are in "
        "transformer_blocks.0–1, single_transformer_blocks.0–1"
    )


def test_other_weights_are_another_lora(draw: Draw) -> None:
    """Nothing that was merged before is taken for it."""
    images = [
        _bytes(draw(loras=[{"path": A, "block_weights": weights}]))[0]
        for weights in ({}, {"*": 0.5}, {"*.ff.*": 0}, {"*": 0}, {})
    ]
    assert images[0] == images[-1]
    assert len(set(images)) == 4
    assert images[3] == _bytes(draw())[0]


# -- in the types and tiers of a GPU ---------------------------------------------------------------


@pytest.mark.parametrize("tier", ["exact_skipping", "turbo"])
def test_in_bfloat16_and_float8(tier: str) -> None:
    """Skipping begins anew after a change, a constant scale over the run is that scale, and the
    model is what it was."""
    pipe = load("nano", LORAS, dtype=torch.bfloat16, KLEIN_SPEED=tier)
    draw = drawer(pipe)
    size = {"width": 64, "height": 64, "num_inference_steps": 16, "guidance_scale": 1}
    base = draw(**size)
    assert base.forwards == STEP_SKIPPING.computed(16)
    curve = draw(**size, loras=[{"path": ZIBBO, "scale": [[0, 0], [0.5, 1]]}])
    # 0 1 2 · 4 · 6 · | 8 9 10 · 12 · 14 15
    assert curve.forwards == base.forwards + 1
    two = [{"path": ZIBBO, "scale": [[0, 1], [0.2, 1]]}, {"path": PIXELKIN, "scale": [[0, -0.5]]}]
    plain = [{"path": ZIBBO, "scale": 1}, {"path": PIXELKIN, "scale": -0.5}]
    assert _bytes(draw(**size, loras=two)) == _bytes(draw(**size, loras=plain))
    again = draw(**size)
    assert _bytes(again) == _bytes(base)
    assert again.warnings == ()
    assert len({*_bytes(base), *_bytes(curve), *_bytes(draw(**size, loras=plain))}) == 3
