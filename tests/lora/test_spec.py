"""When and where a LoRA of a request acts."""

import pytest

from klein.lora.spec import (
    Curve,
    Scale,
    block_names,
    changes,
    deciding,
    scale_at,
    unreached,
)

HALF: Curve = ((0.0, 0.25), (0.5, 1.0))


@pytest.mark.parametrize(
    ("scale", "steps", "expected"),
    [
        (0.7, 3, [0.7, 0.7, 0.7]),
        (HALF, 4, [0.25, 0.25, 1.0, 1.0]),
        (HALF, 5, [0.25, 0.25, 0.25, 1.0, 1.0]),
        (HALF, 1, [0.25]),
        (((0.0, 0.0), (0.3, -1.0), (0.6, 2.0)), 10, [0.0] * 3 + [-1.0] * 3 + [2.0] * 4),
        (((0.0, 0.0), (0.999, 1.0)), 3, [0.0, 0.0, 0.0]),
    ],
)
def test_a_scale_is_constant_from_point_to_point(
    scale: Scale, steps: int, expected: list[float]
) -> None:
    """A point acts from the first step that begins at its fraction or later."""
    assert [scale_at(scale, step, steps) for step in range(steps)] == expected


def test_a_point_is_met_whatever_its_rounding() -> None:
    """The fraction k/n is where step k of n begins."""
    for steps in range(1, 101):
        for step in range(1, steps):
            assert changes([((0.0, 0.0), (step / steps, 1.0))], steps) == (step,)


def test_changes_are_those_of_all_scales_and_only_changes() -> None:
    """Two points with one scale, or in one step, are no change."""
    other: Curve = ((0.0, 1.0), (0.4, 1.0), (0.7, 2.0), (0.75, 3.0))
    assert changes([1.0, HALF, other], 10) == (5, 7, 8)
    assert changes([1.0, HALF, other], 4) == (2, 3)
    assert changes([HALF], 1) == changes([0.3], 10) == changes([], 10) == ()


def test_points_that_never_act() -> None:
    """Those after which no step begins before the next."""
    assert unreached(((0.0, 0.0), (0.4, 1.0), (0.45, 2.0)), 10) == ()
    assert unreached(((0.0, 0.0), (0.41, 1.0), (0.45, 2.0)), 10) == ((0.41, 1.0),)
    assert unreached(HALF, 1) == ((0.5, 1.0),)
    assert unreached(1.0, 1) == ()


@pytest.mark.parametrize(
    ("layer", "weight"),
    [
        ("transformer_blocks.1.attn.to_q", 0.5),
        ("transformer_blocks.10.attn.to_q", 0.0),
        ("transformer_blocks.1.ff.linear_in", 2.0),
        ("single_transformer_blocks.1.attn.to_out", 0.0),
        ("x_embedder", 0.0),
    ],
)
def test_the_last_pattern_that_matches_decides(layer: str, weight: float) -> None:
    """A block's name is for all of the block, and for no other whose name it begins."""
    weights = (("*", 0.0), ("transformer_blocks.1", 0.5), ("transformer_blocks.*.ff.*", 2.0))
    decided = deciding(weights, layer)
    assert decided is not None
    assert decided[1] == weight
    assert deciding(weights[1:], "x_embedder") is None


def test_blocks_in_words() -> None:
    """Ranges, single blocks, and what is in no block."""
    names = ["transformer_blocks.0.attn.to_q", "transformer_blocks.3.ff.linear_in", "x_embedder"]
    assert block_names(names) == "transformer_blocks.0–3, x_embedder"
    assert block_names(["single_transformer_blocks.2.attn.to_out"]) == "single_transformer_blocks.2"
