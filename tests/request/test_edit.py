from typing import Any

import pytest

from klein.core import Margins
from klein.errors import InvalidRequest
from klein.request.edit import EXCLUDES, NEEDS
from tests.support import fakes

ALONE: dict[str, Any] = {
    "reference_megapixels": 1,
    "strength": 0.5,
    "mask": "m",
    "extend": {"left": 16},
    "mask_feather": 0,
    "mask_padding": 0,
}


@pytest.mark.parametrize("field", NEEDS)
def test_a_field_without_what_it_acts_on_is_refused(field: str) -> None:
    """By name, with the way out, even at a value that would change nothing."""
    others, way_out = NEEDS[field]
    with pytest.raises(InvalidRequest) as caught:
        fakes.resolved(**{field: ALONE[field]})
    assert caught.value.field == field
    assert way_out in str(caught.value)
    assert others[0] in str(caught.value)


@pytest.mark.parametrize(("field", "other"), EXCLUDES)
def test_fields_that_rule_each_other_out_are_refused(field: str, other: str) -> None:
    """With what to do instead."""
    values = {name: ALONE[name] for name in (field, other)}
    with pytest.raises(InvalidRequest) as caught:
        fakes.resolved(init_image="i", **values)
    assert caught.value.field == field
    assert EXCLUDES[field, other] in str(caught.value)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"images": ["x"] * 5}, "images"),
        ({"images": ["x", ""]}, "images.1"),
        ({"images": [1]}, "images.0"),
        ({"init_image": "i", "strength": 0}, "strength"),
        ({"init_image": "i", "strength": 1.1}, "strength"),
        ({"init_image": "i", "extend": {"left": 4097}}, "extend.left"),
        ({"init_image": "i", "extend": {}}, "extend"),
        ({"images": ["x"], "reference_megapixels": 0.06}, "reference_megapixels"),
        ({"init_image": "i", "mask": "m", "mask_feather": 257}, "mask_feather"),
        ({"images": ["x"], "width": 10, "height": 64}, "width"),
    ],
)
def test_bad_values_are_refused_before_anything_is_read(values: dict[str, Any], field: str) -> None:
    """By field and index."""
    with pytest.raises(InvalidRequest) as caught:
        fakes.resolved(**values)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("values", "decided"),
    [
        ({}, (None, None, None, None)),
        ({"images": ["x"]}, (None, None, None, 1.0)),
        ({"init_image": "i"}, (0.8, None, None, None)),
        ({"init_image": "i", "mask": "m"}, (1.0, 8, None, 1.0)),
        ({"init_image": "i", "mask": "m", "mask_padding": 0, "strength": 0.5}, (0.5, 8, 0, 1.0)),
        ({"init_image": "i", "extend": {"top": 9}, "mask_feather": 0}, (1.0, 0, None, 1.0)),
    ],
)
def test_what_is_left_open_depends_on_what_is_sent(
    values: dict[str, Any], decided: tuple[float | None, ...]
) -> None:
    """A variation keeps some of its start image, a repainted part none; None does not apply."""
    params = fakes.params(**values)
    assert decided == (
        params.strength,
        params.mask_feather,
        params.mask_padding,
        params.reference_megapixels,
    )


def test_only_pictures_and_loras_need_preparing() -> None:
    """A text alone goes straight to the queue."""
    assert not fakes.resolved().needs_preparing
    assert fakes.resolved(images=["x"]).needs_preparing
    assert fakes.resolved(init_image="x").needs_preparing
    assert fakes.resolved(loras=[{"path": "a/b"}]).needs_preparing


def test_margins() -> None:
    """Sides that are not named stay where they are."""
    assert fakes.params(init_image="i", extend={"top": 9}).extend == Margins(top=9)


def test_formats_that_change_pixels_are_told() -> None:
    """Only a lossless file keeps what lies outside the mask."""
    values = {"init_image": "i", "mask": "m"}
    assert "outside the mask" in fakes.resolved(output_format="jpeg", **values).warnings[0]
    assert not fakes.resolved(output_format="webp", output_quality=100, **values).warnings
    assert not fakes.resolved(output_format="png", output_quality=50, **values).warnings


@pytest.mark.parametrize("preset", ["realistic_character", "edit"])
def test_presets_keep_their_numbers_with_references(preset: str) -> None:
    """A reference changes no other parameter."""
    with_one, without = fakes.params(preset=preset, images=["x"]), fakes.params(preset=preset)
    assert with_one.num_inference_steps == without.num_inference_steps
    assert with_one.guidance_scale == without.guidance_scale
