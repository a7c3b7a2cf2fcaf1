"""Weights that move: images and LoRAs are those of weights that stay."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from klein.core import GenerationResult
from klein.inference import offload
from klein.inference.offload import ModelOffloader
from klein.inference.pipeline import KleinPipeline
from tests.model.conftest import drawer, load, planned, with_loras
from tests.support import loras, tiny

A = {"path": "a.safetensors"}


def _write_lora(folder: Path) -> None:
    loras.write(folder / A["path"], *loras.ai_toolkit(loras.layers(tiny.HIDDEN)))


def _bytes(result: GenerationResult) -> bytes:
    return result.images[0].image.tobytes()


def test_a_new_prompt_after_a_lora_under_model_offload(tiny_folder: Path, tmp_path: Path) -> None:
    """The transformer comes back fresh, and with it a job without LoRAs."""
    _write_lora(tmp_path)
    parts = load(tiny_folder).parts
    offloader = ModelOffloader("cpu", parts.text_encoder, parts.transformer)
    moved = drawer(with_loras(KleinPipeline(parts, *planned(tiny_folder), "", offloader), tmp_path))
    resident = drawer(load(tiny_folder, tmp_path))
    jobs: list[dict[str, Any]] = [
        {"prompt": "one", "loras": [A]},
        {"prompt": "two"},
        {"prompt": "three", "loras": [A]},
        {"prompt": "three"},
    ]
    for values in jobs:
        drawn = moved(**values)
        assert _bytes(drawn) == _bytes(resident(**values))
        assert len(drawn.loras) == len(values.get("loras", []))


def test_sequential_offload_gives_weights_back_for_loras(tiny_folder: Path, tmp_path: Path) -> None:
    """Each layer has its weights only while it works, LoRAs or not."""
    _write_lora(tmp_path)
    resident = drawer(load(tiny_folder, tmp_path))
    parts = load(tiny_folder).parts
    plan, settings = planned(tiny_folder)
    offload.sequentially("cpu", parts.transformer, parts.vae, parts.text_encoder)
    pipe = KleinPipeline(parts, replace(plan, offload="sequential"), settings, "")
    offloaded = drawer(with_loras(pipe, tmp_path))
    for asked in ([], [A], [A], [{**A, "scale": 0.3}], []):
        assert parts.transformer.proj_out.weight.is_meta
        drawn = offloaded(loras=asked)
        assert _bytes(drawn) == _bytes(resident(loras=asked))
        assert [one.applied for one in drawn.loras] == [True for _ in asked]
