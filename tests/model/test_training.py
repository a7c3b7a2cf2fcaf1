"""The data that nano is trained on: instructions, and the references that belong to them."""

import random

import pytest
import torch

from training.attributes import held_out_any, sample
from training.captions import rows
from training.draw import draw, with_looks
from training.edit_check import kept, seen_values, told
from training.edits import BORROWED, combine, instruct, make_combinations, make_edits, to_batch
from training.flow import KINDS, all_position_ids, shares


def test_an_instruction_changes_what_it_says_and_nothing_else() -> None:
    """The result differs from the reference in the changed attributes only, and in all of them."""
    made = make_edits(sample(300, 1), 2)
    for before, edit in zip(rows(made.sources), made.edits, strict=True):
        differing = {name for name in before if before[name] != edit.row[name]}
        assert edit.changed
        assert differing <= edit.changed
        assert edit.text
    assert not held_out_any(made.targets).any()


def test_the_value_that_is_told_is_in_the_words() -> None:
    """A new colour is named in the prompt, unless the prompt leaves it open."""
    words = {"gray": ("gray", "grey"), "blonde": ("blond", "golden")}
    made = make_edits(sample(300, 3), 4)
    for edit in made.edits:
        for name in {"wear_color", "hat_color", "background"} & edit.changed - edit.loose:
            assert any(
                word in edit.text.lower() for word in words.get(edit.row[name], (edit.row[name],))
            )


def test_a_combination_takes_its_thing_from_the_other_reference() -> None:
    """The person's row with the other's values; the numbers in the words fit the order."""
    rng = random.Random(5)
    first, second = rows(sample(200, 6)), rows(sample(200, 7))
    made = [combine(row, other, rng) for row, other in zip(first, second, strict=True)]
    assert sum(edit is not None for edit in made) > 150
    for row, other, edit in zip(first, second, made, strict=True):
        if edit is None:
            continue
        taken = {name: other[name] for thing in edit.borrowed for name in BORROWED[thing]}
        assert edit.row == row | taken
        if edit.person == 2:
            assert "2" in edit.text or "second" in edit.text


def test_rows_and_batches_are_inverse() -> None:
    """A batch survives the way through rows."""
    batch = sample(20, 8)
    again = to_batch(rows(batch))
    assert all(torch.equal(batch[name], again[name]) for name in batch)


def test_an_edit_keeps_every_pixel_that_it_does_not_concern() -> None:
    """Reference and result have the same place, tilt and parting."""
    batch = sample(4, 9) | {"hat": torch.zeros(4, dtype=torch.long)}
    other = batch | {"wear_color": (batch["wear_color"] + 1) % 9}
    before, after = draw(batch, 10, 64, 64), draw(other, 10, 64, 64)
    assert torch.equal(before[:, :, :36], after[:, :, :36])
    assert not torch.equal(before, after)


def test_references_follow_the_picture_at_t_10_and_20() -> None:
    """Positions as the pipeline makes them, for references of other sizes too."""
    ids = all_position_ids((256, 256), ((256, 256), (128, 64)), torch.device("cpu"))
    assert ids[:, 0].tolist() == [0] * 256 + [10] * 256 + [20] * 32
    assert ids[-1].tolist() == [20, 3, 7, 0]


@pytest.mark.parametrize("edits", [0.0, 0.4, 0.75])
def test_shares_of_the_kinds(edits: float) -> None:
    """They add up, and the kinds with references get what was asked for."""
    parts = shares(edits)
    assert sum(parts) == pytest.approx(1)
    given = sum(part for part, kind in zip(parts, KINDS, strict=True) if kind.references)
    assert given == pytest.approx(edits)


@pytest.mark.long
def test_the_judge_of_edits() -> None:
    """It finds true results right, and the unchanged references wrong."""
    made = make_edits(sample(3, 11, test=True), 12, test=True)
    right = seen_values(draw(made.targets, 13), made.targets, 13, "cpu")
    assert told(right, made).all()
    assert all((marks != 0).all() for marks in kept(right, made).values())
    unchanged = seen_values(draw(made.sources, 13), made.targets, 13, "cpu")
    assert not told(unchanged, made).any()


def test_looks_leave_plain_pictures_alone() -> None:
    """Index 0 is no look; the others change the picture."""
    made = make_combinations(sample(4, 14), 15)
    images = draw(made.sources, 16, 64, 64)
    looked = with_looks(images, torch.tensor([0, 1, 2, 3]))
    assert torch.equal(looked[0], images[0])
    assert all(not torch.equal(looked[index], images[index]) for index in (1, 2, 3))


def test_instructions_of_a_seed_are_always_the_same() -> None:
    """The held-out instructions are fixed by their seed."""
    row = rows(sample(1, 17))[0]
    assert instruct(row, random.Random(1)) == instruct(row, random.Random(1))
