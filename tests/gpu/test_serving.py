"""The real pipeline on a real GPU, with the built-in model: every tier and every placement.

python -m pytest tests/gpu      # on a machine with a GPU
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)

from klein.core import GenerationResult
from klein.errors import InvalidRequest, OutOfMemory
from klein.inference import assemble, memory
from klein.inference.acceleration import kernels
from klein.inference.pipeline import KleinPipeline
from tests.model.conftest import drawer, load, planned, with_loras

LORAS = Path("klein/nano/loras")
ZIBBO = {"path": "zibbo.safetensors", "scale": 1.0}
MOST = 2
"""Of 255: what the order of bfloat16 operations makes of twelve steps of a small model."""
REQUEST: dict[str, Any] = {"prompt": "a woman with a green hat", "num_inference_steps": 12}


@pytest.fixture(scope="module")
def eager() -> GenerationResult:
    """The picture that all others are held to: diffusers as it is, on this GPU."""
    return drawer(load("nano", LORAS, KLEIN_SPEED="eager"))(**REQUEST)


@pytest.fixture(autouse=True)
def _empty() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def _gap(a: GenerationResult, b: GenerationResult) -> float:
    levels = [np.asarray(each.images[0].image, dtype=np.int16) for each in (a, b)]
    return float(np.abs(levels[0] - levels[1]).mean())


def _on_gpu(tmp: Path, **settings: str) -> KleinPipeline:
    return load("nano", LORAS, None, KLEIN_KERNEL_CACHE=str(tmp), **settings)


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({"KLEIN_SPEED": "eager"}, 0),
        ({"KLEIN_SPEED": "exact"}, MOST),
        ({"KLEIN_SPEED": "exact", "KLEIN_ATTENTION": "native"}, MOST),
        ({"KLEIN_SPEED": "fast"}, 20),
        ({"KLEIN_SPEED": "turbo"}, 20),
        ({"KLEIN_OFFLOAD": "model"}, MOST),
        ({"KLEIN_OFFLOAD": "sequential"}, MOST),
        ({"KLEIN_VAE_TILING": "on"}, MOST),
    ],
    ids=str,
)
def test_pictures_are_eagers(
    settings: dict[str, str], most: float, eager: GenerationResult, tmp_path: Path
) -> None:
    """But for bfloat16 and what the tier says; with LoRAs on and off again, bit for bit."""
    pipe = _on_gpu(tmp_path, **settings)
    draw = drawer(pipe)
    before = draw(**REQUEST)
    print(settings, f"{_gap(before, eager):.2f} of 255", pipe.info.speed, pipe.info.attention)
    assert _gap(before, eager) <= most
    changed = draw(**REQUEST, loras=[ZIBBO])
    assert changed.loras[0].applied
    assert _gap(before, changed) > 1
    assert _gap(before, draw(**REQUEST)) == 0
    if "KLEIN_SPEED" in settings:
        assert pipe.info.speed == settings["KLEIN_SPEED"]


def test_turbo_draws_what_exact_draws(tmp_path: Path) -> None:
    """Nearly, also where two steps round to one bfloat16 timestep: large, or of many steps."""
    exact, turbo = (drawer(_on_gpu(tmp_path, KLEIN_SPEED=name)) for name in ("exact", "turbo"))
    for values in (
        {"num_inference_steps": 28, "width": 2048, "height": 2048},
        {"num_inference_steps": 50, "width": 640, "height": 960},
        {"num_inference_steps": 75},
        {"num_inference_steps": 28, "schedule": 4.0},
    ):
        expected, drawn = (draw(**{**REQUEST, **values}) for draw in (exact, turbo))
        print(values, f"{_gap(expected, drawn):.2f} of 255")
        assert drawn.forwards < expected.forwards
        assert _gap(expected, drawn) <= 20


def test_nothing_compiles_after_the_start(tmp_path: Path) -> None:
    """Not for a size, a prompt length, a LoRA, a scale, a batch or a schedule."""
    pipe = _on_gpu(tmp_path, KLEIN_SPEED="turbo")
    count, draw = kernels.Compilations.count, drawer(pipe)
    assert count > 0
    for values in (
        {"width": 256, "height": 256},
        {"width": 320, "height": 208},
        {"width": 128, "height": 512, "num_images": 2},
        {"guidance_scale": 1},
        {"max_sequence_length": 77},
        {"loras": [ZIBBO]},
        {"loras": [{**ZIBBO, "scale": 0.3}]},
        {"schedule": "linear"},
    ):
        draw(**{**REQUEST, **values})
    assert kernels.Compilations.count == count == pipe.stats().kernels_compiled


def test_float8_beside_originals_in_main_memory(tmp_path: Path) -> None:
    """The same bits as with both on the GPU, LoRAs included."""
    plan, settings = planned("nano", KLEIN_SPEED="fast", KLEIN_KERNEL_CACHE=str(tmp_path))
    tight = with_loras(assemble.load(replace(plan, originals_fit=False), settings), LORAS)
    roomy = with_loras(assemble.load(plan, settings), LORAS)
    linear = tight.parts.transformer.transformer_blocks[0].attn.to_q
    assert (linear.weight.device.type, linear.float8.device.type) == ("cpu", "cuda")
    for values in ({}, {"loras": [ZIBBO]}, {}):
        assert _gap(drawer(tight)(**REQUEST, **values), drawer(roomy)(**REQUEST, **values)) == 0


def test_running_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot fit is refused before it is tried; what did not fit is tried once more."""
    pipe = _on_gpu(tmp_path, KLEIN_SPEED="exact")
    big = {**REQUEST, "width": 2048, "height": 2048, "num_inference_steps": 1}
    draw = drawer(pipe)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    draw(**big)
    need = torch.cuda.max_memory_allocated() - before

    def leave(size: float) -> torch.Tensor:
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        return torch.empty(int(free - size), dtype=torch.uint8, device="cuda")

    held = leave(1.5e9)
    with pytest.raises(InvalidRequest, match=r"2048×2048 needs about 3\.9 GB"):
        draw(**big)
    monkeypatch.setattr(memory, "require_room", lambda *_: None)
    del held
    held = leave(0.05 * need)
    with pytest.raises(OutOfMemory, match="twice"):
        draw(**big)
    del held
    outcomes = []
    for share in (0.75, 0.65, 0.55, 0.45, 0.35, 0.25):
        held = leave(share * need)
        try:
            retried = any("GPU memory ran out" in each for each in draw(**big).warnings)
            outcomes.append("retried" if retried else "fits")
        except OutOfMemory:
            outcomes.append("refused")
        del held
    print(outcomes)
    assert "retried" in outcomes
    assert outcomes == sorted(outcomes, key=("fits", "retried", "refused").index)
    torch.cuda.empty_cache()
    assert not draw(**REQUEST).warnings
