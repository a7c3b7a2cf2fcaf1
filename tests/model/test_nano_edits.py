"""What nano edits and repaints, on drawings whose every attribute is known."""

from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import repainting
from klein.inference.pipeline import KleinPipeline
from klein.models.identify import NANO_FOLDER
from tests.model.conftest import drawer, load, pictures_of
from tests.support import pictures
from training.attributes import ATTRIBUTES
from training.check import is_character, judge, likeness, saturation
from training.draw import draw, pencil
from training.edit_check import as_pil, seen_values, visible
from training.edits import to_batch

Row = dict[str, str]

STEPS, PLACE = 10, 3
PERSON: Row = {
    "who": "woman",
    "hair": "red",
    "style": "long",
    "eyes": "green",
    "skin": "light",
    "wear": "hoodie",
    "wear_color": "yellow",
    "hat": "brimmed hat",
    "hat_color": "blue",
    "glasses": "none",
    "scarf": "none",
    "scarf_color": "red",
    "earrings": "none",
    "beard": "none",
    "freckles": "none",
    "expression": "smiling",
    "background": "blue",
    "pattern": "plain",
}
OTHER = PERSON | {
    "who": "man",
    "hair": "black",
    "style": "short",
    "skin": "tan",
    "wear": "sweater",
    "wear_color": "green",
    "hat": "beanie",
    "hat_color": "purple",
    "background": "orange",
}
LOOKED_AT = (
    "who",
    "hair",
    "eyes",
    "skin",
    "wear",
    "wear_color",
    "hat_color",
    "glasses",
    "background",
)


@pytest.fixture(scope="module")
def nano() -> KleinPipeline:
    return load("nano", NANO_FOLDER / "loras")


def _drawing(row: Row) -> torch.Tensor:
    return draw(to_batch([row]), PLACE)


def _sent(row: Row) -> str:
    (image,) = as_pil(_drawing(row))
    return pictures.text(image)


def _edit(nano: KleinPipeline, prompt: str, *references: Row, **values: Any) -> torch.Tensor:
    """The picture (1, 3, 256, 256) that an instruction makes of drawings."""
    images = [_sent(row) for row in references]
    result = drawer(nano)(prompt=prompt, images=images, seed=1, num_inference_steps=STEPS, **values)
    return pictures_of(result)


def _wrong(picture: torch.Tensor, expected: Row) -> Row:
    """What the picture shows where it is not as expected; empty when it is."""
    names = [name for name in LOOKED_AT if visible(name, PERSON, expected)]
    found = seen_values(picture, to_batch([expected]), PLACE, "cpu", names)
    seen = {name: ATTRIBUTES[name][int(found[name])] for name in names}
    return {name: value for name, value in seen.items() if value != expected[name]}


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("make the hat green", {"hat_color": "green"}),
        pytest.param(
            "change the background to yellow and give her sunglasses",
            {"background": "yellow", "glasses": "sunglasses"},
            marks=pytest.mark.long,
        ),
        pytest.param(
            "the same woman with black hair, in a purple hoodie",
            {"hair": "black", "wear_color": "purple"},
            marks=pytest.mark.long,
        ),
    ],
)
def test_an_instruction_changes_what_it_tells(nano: KleinPipeline, prompt: str, told: Row) -> None:
    """That is as told, and the rest as in the reference."""
    assert not _wrong(_edit(nano, prompt, PERSON), PERSON | told)


def test_a_thing_of_the_second_reference_goes_to_the_person_of_the_first(
    nano: KleinPipeline,
) -> None:
    """The other's hat, nothing else of theirs."""
    expected = PERSON | {name: OTHER[name] for name in ("hat", "hat_color")}
    picture = _edit(nano, "the person of image 1 with the hat of image 2", PERSON, OTHER)
    assert not _wrong(picture, expected)


def test_the_character_lora_takes_over_from_a_reference(nano: KleinPipeline) -> None:
    """Zibbo in the clothes and before the background of the picture."""
    loras = [{"path": "zibbo.safetensors"}]
    prompt = "zibbo with the clothes and the background of image 1"
    picture = _edit(nano, prompt, PERSON, loras=loras)
    assert is_character(picture)[0]
    for name in ("wear_color", "background"):
        assert ATTRIBUTES[name][int(judge(picture, name))] == PERSON[name], name


def test_the_pencil_lora_draws_its_reference(nano: KleinPipeline) -> None:
    """Gray, and like the drawing of this person rather than of another; in colour without it."""
    prompt = "turn image 1 into a pencilkin drawing"
    picture = _edit(nano, prompt, PERSON, loras=[{"path": "pencilkin.safetensors"}])
    assert saturation(picture)[0] < 0.06
    own, other = (likeness(picture, pencil(_drawing(row)))[0] for row in (PERSON, OTHER))
    assert own > 0.8
    assert own > other + 0.2
    assert saturation(_edit(nano, prompt, PERSON))[0] > 0.15


def test_repainting_does_what_it_is_told_and_leaves_no_seam(nano: KleinPipeline) -> None:
    """A hat and clothes through ellipses; outside, the caller's own pixels. The long form is
    `python -m benchmarks.repainting`."""
    cases = repainting.repaints(1, ("hat", "clothes"))
    measured, _ = repainting.measure(repainting.Painter(nano), cases, STEPS)
    for one in measured:
        assert one.told, one
        assert one.unchanged, one
        assert one.seam <= 1.5, one


def test_seams_are_seen() -> None:
    """A drawing has none; one that is darker inside a mask has."""
    cases = repainting.repaints(1, ("hat",))
    (image,), (mask,) = cases.images, cases.masks
    assert repainting.seam(image, mask) < 1.5
    darker = Image.eval(image, lambda value: value * 7 // 8)
    assert repainting.seam(Image.composite(darker, image, mask), mask) > 2
