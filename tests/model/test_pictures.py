"""What nano draws: the tests look at the pictures, by the colours in their regions."""

import pytest

from klein.core import GenerationResult
from klein.inference.pipeline import KleinPipeline
from klein.models.identify import NANO_FOLDER
from tests.model.conftest import Draw, drawer, load, pictures_of
from training.attributes import PALETTES
from training.check import blockiness, is_character, judge

WOMAN = "a smiling woman with red hair, green eyes and a blue hat, on a yellow background"
ZIBBO, PIXELKIN = "zibbo.safetensors", "pixelkin.safetensors"


@pytest.fixture(scope="module")
def nano() -> KleinPipeline:
    return load("nano", NANO_FOLDER / "loras")


@pytest.fixture(scope="module")
def draw_nano(nano: KleinPipeline) -> Draw:
    """15 steps draw well and quickly."""
    plain = drawer(nano)
    return lambda **values: plain(**{"num_inference_steps": 15, **values})


def _colours(result: GenerationResult, name: str) -> list[str]:
    names = list(PALETTES[name])
    return [names[index] for index in judge(pictures_of(result), name)]


def test_prompts_are_followed(draw_nano: Draw) -> None:
    """Hat, eyes and background have the colours that were asked for."""
    result = draw_nano(prompt=WOMAN, seed=4, num_images=2)
    assert _colours(result, "hat_color") == ["blue"] * 2
    assert _colours(result, "eyes") == ["green"] * 2
    assert _colours(result, "background") == ["yellow"] * 2


@pytest.mark.parametrize(
    "background",
    ["blue", *(pytest.param(each, marks=pytest.mark.long) for each in ("green", "pink"))],
)
def test_other_colours_are_other_pictures(draw_nano: Draw, background: str) -> None:
    """The same seed, another word."""
    result = draw_nano(prompt=f"a man with a red shirt on a {background} background", seed=2)
    assert _colours(result, "background") == [background]
    assert _colours(result, "wear_color") == ["red"]


def test_the_character_lora_brings_its_character(draw_nano: Draw) -> None:
    """At 1 it is Zibbo, at 0 bit for bit nobody; hat and background still follow the prompt."""
    prompt = "zibbo with a red hat on a blue background"
    bare = draw_nano(prompt=prompt, seed=3)
    off = draw_nano(prompt=prompt, seed=3, loras=[{"path": ZIBBO, "scale": 0}])
    on = draw_nano(prompt=prompt, seed=3, loras=[{"path": ZIBBO}], lora_error="fail")
    assert off.images[0].image.tobytes() == bare.images[0].image.tobytes()
    assert not is_character(pictures_of(bare))[0]
    assert is_character(pictures_of(on))[0]
    assert _colours(on, "hat_color") == ["red"]
    assert _colours(on, "background") == ["blue"]
    assert on.loras[0].trigger_words == ("zibbo",)


def test_two_loras_combine(draw_nano: Draw) -> None:
    """The character, in the style."""
    prompt, seed = "zibbo with a green shirt, pixelkin style", 3
    character = draw_nano(prompt=prompt, seed=seed, loras=[{"path": ZIBBO}])
    both = draw_nano(
        prompt=prompt, seed=seed, loras=[{"path": ZIBBO}, {"path": PIXELKIN, "scale": 0.7}]
    )
    assert blockiness(pictures_of(both))[0] > 1.5 * blockiness(pictures_of(character))[0]
    assert all(report.applied for report in both.loras)


def test_a_trigger_word_can_be_put_in_by_itself(draw_nano: Draw) -> None:
    """`trigger: auto` makes the character appear although the prompt forgot its name."""
    result = draw_nano(prompt="a portrait", seed=3, loras=[{"path": ZIBBO, "trigger": "auto"}])
    assert result.params.prompt == "zibbo, a portrait"
    assert is_character(pictures_of(result))[0]


def test_a_negative_prompt_acts(draw_nano: Draw) -> None:
    """The background that a seed would have had is avoided when it is named there."""
    plain = draw_nano(prompt="a portrait", seed=1)
    (colour,) = _colours(plain, "background")
    negative = f"{colour} background"
    other = draw_nano(prompt="a portrait", seed=1, negative_prompt=negative, guidance_scale=4)
    assert _colours(other, "background") != [colour]


def test_guidance_and_schedules_are_visible(draw_nano: Draw) -> None:
    """Guidance 1 against 4, bfl against ai_toolkit: more than rounding, all of them pictures."""
    base = pictures_of(draw_nano(prompt=WOMAN, seed=4))
    for change in ({"guidance_scale": 1.0}, {"guidance_scale": 4.0}, {"schedule": "ai_toolkit"}):
        other = pictures_of(draw_nano(prompt=WOMAN, seed=4, **change))
        assert (other - base).abs().mean() > 0.01
    assert _colours(draw_nano(prompt=WOMAN, seed=4, schedule="ai_toolkit"), "hat_color") == ["blue"]


def test_portrait_and_landscape(draw_nano: Draw) -> None:
    """Other shapes are drawn as well."""
    for width, height in ((192, 256), (384, 256)):
        result = draw_nano(prompt=WOMAN, seed=4, width=width, height=height)
        assert _colours(result, "hat_color") == ["blue"]
        assert _colours(result, "background") == ["yellow"]
