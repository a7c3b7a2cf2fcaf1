from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klein.errors import InvalidRequest
from klein.lora.file import Identity, LoraFile
from klein.lora.metadata import LoraDefaults
from klein.lora.spec import LoraSpec
from klein.models.catalog import MODELS
from klein.request.presets import PRESETS
from klein.request.resolve import Resolved, resolve
from klein.request.schema import GenerateRequest, parse

NINE, NANO, DISTILLED = MODELS["klein-base-9B"], MODELS["nano"], MODELS["klein-9B"]


def _resolve(model: Any = NINE, **values: Any) -> Resolved:
    return resolve(parse({"prompt": "a portrait", **values}), model, lambda: 42)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fills_what_is_open(name: str) -> None:
    """Nothing but the preset's name: all its values arrive."""
    preset, params = PRESETS[name], _resolve(preset=name).params
    assert (params.width, params.height) == (preset.width, preset.height)
    assert params.num_inference_steps == preset.num_inference_steps
    assert params.guidance_scale == preset.guidance_scale
    assert params.schedule == preset.schedule
    assert params.max_sequence_length == 512


def test_explicit_values_win_over_the_preset() -> None:
    """Even when they happen to be another preset's defaults, and null means left open."""
    params = _resolve(
        preset="portrait_hd", height=1024, num_inference_steps=28, guidance_scale=None
    ).params
    assert (params.width, params.height) == (1024, 1024)
    assert params.num_inference_steps == 28
    assert params.guidance_scale == PRESETS["portrait_hd"].guidance_scale


def test_sizes_scale_to_the_native_size() -> None:
    """On nano a portrait stays a portrait; explicit sizes are pixels."""
    assert (_resolve(NANO, preset="portrait_hd").params.height) == 384
    assert (_resolve(NANO, preset="portrait_hd", height=320).params.height) == 320


def test_rounding_is_told() -> None:
    """A size that is not a multiple of 16 is rounded, and the result says from what to what."""
    resolved = _resolve(width=1000, height=1010)
    assert (resolved.params.width, resolved.params.height) == (1008, 1008)
    assert "1000×1010 was rounded to 1008×1008" in resolved.warnings[0]


def test_sizes_far_above_nanos_are_told() -> None:
    """It draws them, with broken shapes."""
    assert "shapes can break" in _resolve(NANO, width=512, height=512).warnings[0]
    assert not _resolve(NANO, width=256, height=384).warnings
    assert not _resolve(NINE, width=2048, height=2048).warnings


@pytest.mark.parametrize(
    "size", [{"width": 32}, {"width": 2048, "height": 2064}, {"width": 1024, "height": 64}]
)
def test_impossible_sizes_are_refused_by_field(size: dict[str, int]) -> None:
    """The field is named, and what is possible."""
    with pytest.raises(InvalidRequest) as caught:
        _resolve(**size)
    assert caught.value.field == "width"


def test_distilled_models_keep_their_steps_and_guidance() -> None:
    """A preset's 28 steps and guidance make no sense there; an explicit guidance is explained."""
    params = _resolve(DISTILLED).params
    assert (params.num_inference_steps, params.guidance_scale) == (4, 1.0)
    told = _resolve(DISTILLED, guidance_scale=3, num_inference_steps=6)
    assert (told.params.num_inference_steps, told.params.guidance_scale) == (6, 1.0)
    assert "distilled" in told.warnings[0]


def test_a_negative_prompt_without_guidance_is_told() -> None:
    """It would silently do nothing."""
    assert "no effect" in _resolve(negative_prompt="blue", guidance_scale=1).warnings[0]
    assert not _resolve(negative_prompt="blue").warnings


def test_seed_is_drawn_only_when_open() -> None:
    """Zero is a seed."""
    assert _resolve().params.seed == 42
    assert _resolve(seed=0).params.seed == 0


def test_sequence_length_is_the_models() -> None:
    """Nano reads 128 tokens: the preset's 512 fit silently, an explicit 512 is told."""
    assert _resolve(NANO).params.max_sequence_length == NANO.max_sequence_length
    assert not _resolve(NANO).warnings
    assert "max_sequence_length" in _resolve(NANO, max_sequence_length=512).warnings[0]


def test_the_first_workers_lora_fields() -> None:
    """lora_path and lora_scale are one LoRA; an empty path is none; a lone scale is told."""
    (lora,) = _resolve(lora_path="a.safetensors", lora_scale=0.85).params.loras
    assert (lora.path, lora.scale) == ("a.safetensors", 0.85)
    assert _resolve(lora_path="", lora_scale=1.0).params.loras == ()
    assert not _resolve(lora_path="", lora_scale=1.0).warnings
    assert "lora_path" in _resolve(lora_path="", lora_scale=0.5).warnings[0]
    both = _resolve(loras=[{"path": "x/y"}], lora_path="a.safetensors").params.loras
    assert [one.path for one in both] == ["x/y", "a.safetensors"]


@given(st.integers(1, 8192), st.integers(1, 8192))
def test_any_size_is_made_possible_or_refused(width: int, height: int) -> None:
    """What comes out of resolve can always be drawn."""
    request = GenerateRequest(prompt="x", width=width, height=height)
    try:
        params = resolve(request, NINE, lambda: 1).params
    except InvalidRequest:
        return
    assert params.width % 16 == 0
    assert params.height % 16 == 0
    assert min(params.width, params.height) >= 64
    assert params.width * params.height <= 2048 * 2048


def test_loras_in_the_prompt() -> None:
    """Understood when allowed, and then taken out of it; left alone otherwise."""
    request = parse({"prompt": "anna <lora:anna:0.8> in a café, <lora:me/bob@v1>", "seed": 1})
    params = resolve(request, NINE, lambda: 1, prompt_loras=True).params
    assert params.prompt == "anna in a café"
    assert [(x.path, x.scale) for x in params.loras] == [
        ("anna.safetensors", 0.8),
        ("me/bob@v1", None),
    ]
    assert resolve(request, NINE, lambda: 1).params.prompt == request.prompt
    assert (
        resolve(parse({"prompt": "a  b"}), NINE, lambda: 1, prompt_loras=True).params.prompt
        == "a  b"
    )


@pytest.mark.parametrize("prompt", ["x <lora:a:9>", "x <lora:a:big>", "<lora:a:1>"])
def test_bad_loras_in_the_prompt(prompt: str) -> None:
    """Refused by field."""
    with pytest.raises(InvalidRequest) as caught:
        resolve(parse({"prompt": prompt}), NINE, lambda: 1, prompt_loras=True)
    assert caught.value.field == "prompt"


def _file(scale: float | None = None, trigger: str | None = None) -> LoraFile:
    nowhere, own = Identity(0, 0, 0, 0, 0), LoraDefaults(scale, trigger)
    return LoraFile(Path("x"), "x", "0", "ai-toolkit", 1, (), (), {}, nowhere, own)


def test_noise_levels_say_how_many_steps() -> None:
    """For distilled models too; another number beside them is refused."""
    levels = [1.0, 0.6, 0.3]
    for model in (NINE, MODELS["klein-9B"]):
        assert _resolve(model, schedule=levels).params.num_inference_steps == 3
    assert _resolve(schedule=levels, num_inference_steps=3).params.schedule == tuple(levels)
    with pytest.raises(InvalidRequest, match="schedule has 3 noise levels"):
        _resolve(schedule=levels, num_inference_steps=4)


def test_base_loras_are_always_on() -> None:
    """First, at the operator's scale, once; a request can neither remove nor change them."""
    base = (LoraSpec("turbo.safetensors", 1.0),)

    def resolved(*loras: dict[str, Any]) -> Resolved:
        request = parse({"prompt": "x", "seed": 1, "loras": list(loras)})
        return resolve(request, NINE, lambda: 1, base_loras=base)

    anna = {"path": "anna.safetensors", "scale": 0.8}
    assert resolved().params.loras == base
    assert resolved().needs_preparing
    both = (*base, LoraSpec("anna.safetensors", 0.8))
    assert resolved(anna).params.loras == both
    again = resolved({"path": "turbo.safetensors", "scale": 1.0}, anna)
    assert (again.params.loras, again.warnings) == (both, ())
    off = resolved({"path": "turbo.safetensors", "scale": 0}, anna)
    assert off.params.loras == both
    assert "turbo.safetensors is always on here at scale 1" in off.warnings[0]


@pytest.mark.parametrize(
    ("model", "loras", "warned"),
    [
        (NINE, [], True),
        (NINE, [{"path": "anna.safetensors"}], True),
        (NINE, [{"path": "klein_9B_Turbo_r128.safetensors"}], False),
        (MODELS["klein-9B"], [], False),
    ],
)
def test_the_turbo_preset_wants_a_turbo_lora(model: Any, loras: list[Any], warned: bool) -> None:
    """8 steps of a base model without one are blurred, and the answer says so."""
    made = _resolve(model, preset="turbo_lora", loras=loras)
    assert any("with a turbo LoRA on" in warning for warning in made.warnings) == warned
    assert (made.params.guidance_scale, made.params.sampler) == (1.0, "euler")


def test_the_speed_is_the_servers_or_one_that_it_has() -> None:
    """What it has not is refused with what it has."""

    def speed(**values: str) -> str:
        request, has = parse({"prompt": "x", **values}), ("fast", "turbo")
        return resolve(request, NINE, lambda: 1, speed=has[0], speeds=has).params.speed

    assert (speed(), speed(speed="fast"), speed(speed="turbo")) == ("fast", "fast", "turbo")
    with pytest.raises(InvalidRequest, match="draws in fast and also has turbo") as caught:
        speed(speed="exact")
    assert caught.value.field == "speed"


def test_block_weights_are_of_layers_that_the_model_has() -> None:
    """A pattern for none is refused with the model's blocks; they stay in their order."""

    def of(**weights: float) -> Any:
        (lora,) = _resolve(loras=[{"path": "a", "block_weights": weights}]).params.loras
        return lora.block_weights

    assert of(**{"*": 0, "transformer_blocks.7": 1}) == (("*", 0.0), ("transformer_blocks.7", 1.0))
    for pattern in ("transformer_blocks.8", "double_blocks.*", "[", "transformer_block"):
        with pytest.raises(InvalidRequest, match=r"single_transformer_blocks\.0–23") as caught:
            of(**{"*": 1, pattern: 0.5})
        assert caught.value.field == "loras.0.block_weights"
        assert repr(pattern) in str(caught.value)
