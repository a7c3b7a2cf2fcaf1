"""What the tiers do to pictures, on trained weights: klein's own forward in plain torch.

The Triton kernels behind the same functions are tests/gpu's.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from klein.core import Delivery, GenerationResult
from klein.errors import ModelUnavailable
from klein.inference.acceleration import attention, ops
from klein.inference.acceleration import vae as decoder
from klein.inference.acceleration.transformer import FusedForward, block_linears
from klein.inference.offload import ModelOffloader
from klein.inference.pipeline import KleinPipeline
from klein.models.speed import STEP_SKIPPING
from klein.output import response
from klein.output.marks import Marks
from tests.model.conftest import drawer, load, planned, with_loras
from tests.support import loras, tiny

ZIBBO = {"path": "zibbo.safetensors", "scale": 1.0}
LORAS = Path("klein/nano/loras")


@pytest.fixture(scope="module", params=["exact", "fast", "turbo"])
def tier(request: pytest.FixtureRequest) -> KleinPipeline:
    return load("nano", LORAS, KLEIN_SPEED=request.param)


@pytest.fixture(scope="module")
def eager() -> KleinPipeline:
    return load("nano", LORAS)


def _levels(result: GenerationResult) -> list[Any]:
    return [np.asarray(each.image, dtype=np.int16) for each in result.images]


def _worst_and_mean(a: GenerationResult, b: GenerationResult) -> tuple[int, float]:
    gaps = [np.abs(x - y) for x, y in zip(_levels(a), _levels(b), strict=True)]
    return int(max(gap.max() for gap in gaps)), float(np.mean([gap.mean() for gap in gaps]))


REQUESTS: dict[str, dict[str, Any]] = {
    "guided": {},
    "unguided": {"guidance_scale": 1},
    "negative": {"negative_prompt": "a red hat"},
    "landscape, twice": {"width": 192, "height": 128, "num_images": 2},
    "LoRA": {"loras": [ZIBBO]},
    "linear schedule": {"schedule": "linear"},
}


@pytest.mark.parametrize("name", REQUESTS)
def test_pictures_against_eager(tier: KleinPipeline, eager: KleinPipeline, name: str) -> None:
    """exact is within 2 of 255 in every pixel; the others' difference is printed and bounded."""
    steps = 20 if tier.info.speed == "turbo" else 8
    values = {"prompt": "a woman with a green hat", "num_inference_steps": steps, **REQUESTS[name]}
    made, expected = drawer(tier)(**values), drawer(eager)(**values)
    worst, mean = _worst_and_mean(made, expected)
    print(f"{tier.info.speed}, {name}: {mean:.2f} of 255, at most {worst}")
    if tier.info.speed == "exact":
        assert worst <= 2
        assert made.forwards == expected.forwards
    else:
        assert 0 < mean < 20
    if tier.info.speed == "turbo":
        images, branches = values.get("num_images", 1), 1 if name == "unguided" else 2
        computed = STEP_SKIPPING.computed(steps) * branches * images
        assert made.forwards == computed < expected.forwards


def test_the_result_names_the_tier(tier: KleinPipeline) -> None:
    """Nobody has to guess how a picture was made."""
    result = drawer(tier)(prompt="a man", num_inference_steps=2)
    answer = response.to_json(result, Delivery("png", 95, "base64"), Marks())
    assert answer["model"]["speed"] == tier.info.speed
    assert "fused" in answer["model"]["speed_options"]


def test_base_lora_base_is_bit_identical(tier: KleinPipeline) -> None:
    """In every tier, and the report proves the same change whatever the weights act through."""
    draw = drawer(tier)
    values = {"prompt": "a portrait", "num_inference_steps": 2}
    before = draw(**values)
    changed = draw(**values, loras=[ZIBBO])
    after = draw(**values)
    assert _worst_and_mean(before, after) == (0, 0)
    assert _worst_and_mean(before, changed)[1] > 1
    report = changed.loras[0]
    assert report.applied
    assert report.relative_change


@pytest.mark.parametrize("folder", ["tiny", "nano"])
@torch.inference_mode()
def test_the_forward_is_diffusers(folder: str, tiny_folder: Path) -> None:
    """For one text, for two, and for two that share one image."""
    model = load(tiny_folder if folder == "tiny" else "nano").parts.transformer
    fused = FusedForward(model, attention.BACKENDS["native"].attend)
    torch.manual_seed(0)
    ids = torch.cartesian_prod(*(torch.arange(n) for n in (1, 6, 4, 1)))[None]
    texts = torch.cartesian_prod(*(torch.arange(n) for n in (1, 1, 1, 16)))[None]
    for images, branches in ((1, 1), (2, 2), (1, 2)):
        given = {
            "hidden_states": torch.randn(images, 24, 128),
            "encoder_hidden_states": torch.randn(branches, 16, model.config.joint_attention_dim),
            "timestep": torch.full((branches,), 0.7),
            "img_ids": ids,
            "txt_ids": texts,
        }
        made = fused(**given)[0]
        given["hidden_states"] = given["hidden_states"].expand(branches, -1, -1)
        expected = model(**given, return_dict=False)[0]
        assert (made - expected).norm() / expected.norm() < 1e-5


@torch.inference_mode()
def test_the_decoder_is_diffusers() -> None:
    """Channels last, norm and activation together, also in tiles."""
    vae = load("nano").parts.vae
    latents = torch.randn(1, 32, 8, 6)
    expected = vae.decode(latents, return_dict=False)[0]
    decoder.fuse(vae)
    made = vae.decode(latents, return_dict=False)[0]
    assert (made - expected).abs().max() < 1e-4


def test_float8_keeps_what_it_can() -> None:
    """Each weight is within float8's half step of its output's scale."""
    layer = torch.nn.Linear(64, 32, bias=False)
    weight = torch.randn(32, 64) * torch.logspace(-3, 3, 32)[:, None]
    ops.quantise_weight(layer, weight)
    values, scale = layer.get_buffer("float8"), layer.get_buffer("float8_scale")
    kept = values.float() * scale.t()
    assert ((kept - weight).abs() <= weight.abs() / 16 + scale.t() * 2**-9).all()


def test_originals_of_float8_stay_where_they_are() -> None:
    """LoRAs are merged from them, so nothing may be rounded twice."""
    pipe = load("nano", LORAS, KLEIN_SPEED="fast")
    layers = block_linears(pipe.parts.transformer)
    before = {name: layer.weight.clone() for name, layer in layers.items()}
    drawer(pipe)(prompt="a portrait", num_inference_steps=1, loras=[ZIBBO])
    assert all(torch.equal(layers[name].weight, weight) for name, weight in before.items())


def test_model_offload_moves_and_forgets(tiny_folder: Path, tmp_path: Path) -> None:
    """Pictures are the same as without it, with LoRAs and after them, whatever had to leave."""
    shapes = loras.layers(tiny.HIDDEN)
    loras.write(tmp_path / "a.safetensors", *loras.ai_toolkit(shapes))
    resident = load(tiny_folder, tmp_path)
    parts = load(tiny_folder).parts
    offloader = ModelOffloader("cpu", parts.text_encoder, parts.transformer)
    originals = offloader.originals(parts.transformer)
    kept = {name: weight.clone() for name, weight in originals.items()}
    pipe = KleinPipeline(parts, *planned(tiny_folder), "", offloader)
    offloaded = with_loras(pipe, tmp_path)
    jobs: list[dict[str, Any]] = [
        {"prompt": "one"},
        {"prompt": "two", "loras": [{"path": "a.safetensors", "scale": 0.8}]},
        {"prompt": "two", "loras": [{"path": "a.safetensors", "scale": 0.8}]},
        {"prompt": "three", "loras": [{"path": "a.safetensors", "scale": 0.3}]},
        {"prompt": "two"},
        {"prompt": "one"},
    ]
    for values in jobs:
        assert _worst_and_mean(drawer(offloaded)(**values), drawer(resident)(**values)) == (0, 0)
    assert all(torch.equal(originals[name], weight) for name, weight in kept.items())


def test_a_tier_that_cannot_be_stops_the_start(tmp_path: Path) -> None:
    """A distilled model has no step to spare."""
    with pytest.raises(ModelUnavailable, match="KLEIN_SPEED=fast can"):
        load(tiny.save(tmp_path / "distilled", distilled=True), KLEIN_SPEED="turbo")
