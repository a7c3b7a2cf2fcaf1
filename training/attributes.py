"""What a nano portrait is made of: attributes, their values, and the colours behind the names.

A batch of portraits is a `Batch`: one LongTensor of value indices, shape (N,), per attribute.
"""

import torch

Rgb = tuple[int, int, int]
Batch = dict[str, torch.Tensor]

HAIR: dict[str, Rgb] = {
    "black": (44, 40, 50),
    "brown": (122, 74, 42),
    "blonde": (242, 204, 98),
    "red": (206, 60, 38),
    "white": (234, 234, 242),
    "blue": (62, 116, 222),
    "pink": (246, 134, 184),
    "green": (66, 170, 96),
}
EYES: dict[str, Rgb] = {
    "blue": (58, 132, 236),
    "green": (48, 164, 84),
    "brown": (128, 76, 34),
    "purple": (146, 78, 206),
}
SKIN: dict[str, Rgb] = {
    "light": (253, 222, 200),
    "tan": (234, 184, 138),
    "brown": (178, 120, 80),
    "dark": (116, 75, 56),
}
CLOTH: dict[str, Rgb] = {
    "red": (216, 48, 52),
    "orange": (246, 138, 36),
    "yellow": (250, 212, 62),
    "green": (58, 164, 82),
    "blue": (52, 104, 216),
    "purple": (134, 76, 192),
    "pink": (247, 138, 186),
    "white": (243, 243, 246),
    "black": (48, 46, 56),
}
BACKGROUND: dict[str, Rgb] = {
    "red": (228, 94, 88),
    "orange": (249, 170, 92),
    "yellow": (253, 224, 118),
    "green": (138, 208, 140),
    "blue": (122, 182, 242),
    "purple": (178, 144, 228),
    "pink": (251, 184, 212),
    "white": (246, 245, 241),
    "gray": (158, 162, 172),
}

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "who": ("woman", "man"),
    "hair": tuple(HAIR),
    "style": ("short", "long", "curly", "bob", "bun", "ponytail", "spiky"),
    "eyes": tuple(EYES),
    "skin": tuple(SKIN),
    "wear": ("t-shirt", "hoodie", "sweater", "collared shirt"),
    "wear_color": tuple(CLOTH),
    "hat": ("none", "brimmed hat", "beanie", "cap", "party hat"),
    "hat_color": tuple(CLOTH),
    "glasses": ("none", "glasses", "sunglasses"),
    "scarf": ("none", "scarf"),
    "scarf_color": tuple(CLOTH),
    "earrings": ("none", "earrings"),
    "beard": ("none", "beard"),
    "freckles": ("none", "freckles"),
    "expression": ("smiling", "laughing", "serious", "sad", "surprised", "winking"),
    "background": tuple(BACKGROUND),
    "pattern": ("plain", "dots", "stripes", "rays"),
}
"""Every attribute and its values; `none` comes first where a thing can be absent."""

PALETTES: dict[str, dict[str, Rgb]] = {
    "hair": HAIR,
    "eyes": EYES,
    "skin": SKIN,
    "wear_color": CLOTH,
    "hat_color": CLOTH,
    "scarf_color": CLOTH,
    "background": BACKGROUND,
}

HELD_OUT_PAIRS = (("hair", "wear_color"), ("hat_color", "background"), ("wear_color", "background"))
"""Attribute pairs of which one combination in seven is never trained on."""

_CHANCE: dict[str, tuple[float, ...]] = {
    "hat": (0.48, 0.16, 0.13, 0.13, 0.10),
    "glasses": (0.70, 0.20, 0.10),
    "scarf": (0.84, 0.16),
    "earrings": (0.75, 0.25),
    "beard": (0.68, 0.32),
    "freckles": (0.82, 0.18),
    "pattern": (0.49, 0.17, 0.17, 0.17),
}


def held_out(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Tell which value pairs (indices, any shape) are kept for the test."""
    return (first + 3 * second) % 7 == 2


def _draw(name: str, count: int, generator: torch.Generator) -> torch.Tensor:
    weights = _CHANCE.get(name) or (1.0,) * len(ATTRIBUTES[name])
    return torch.multinomial(torch.tensor(weights), count, replacement=True, generator=generator)


def held_out_any(batch: Batch) -> torch.Tensor:
    """Tell which portraits (N,) contain a held-out pair."""
    bad = torch.zeros(len(batch["who"]), dtype=torch.bool)
    for first, second in HELD_OUT_PAIRS:
        pair = held_out(batch[first], batch[second])
        if first == "hat_color":
            pair &= batch["hat"] > 0
        bad |= pair
    return bad


def sample(count: int, seed: int, test: bool = False) -> Batch:
    """Draw `count` portraits without held-out pairs, or only such with all three pairs held out."""
    generator = torch.Generator().manual_seed(seed)
    batch = {name: _draw(name, count, generator) for name in ATTRIBUTES}
    batch["beard"] = batch["beard"] * (batch["who"] == 1)
    if test:
        return _make_test(batch)
    while (bad := held_out_any(batch)).any():
        for name in ("hair", "wear_color", "hat_color", "background"):
            fresh = _draw(name, count, generator)
            batch[name] = torch.where(bad, fresh, batch[name])
    return batch


def _make_test(batch: Batch) -> Batch:
    """Move hair and hat colour to values that are held out with the clothing and background."""
    inverse_of_three = 5  # 3 * 5 = 1 mod 7
    wear = batch["wear_color"]
    background = ((2 - wear) * inverse_of_three) % 7
    batch["background"] = background
    batch["hair"] = (2 - 3 * wear) % 7
    batch["hat_color"] = (2 - 3 * background) % 7
    return batch


def part(batch: Batch, start: int, size: int) -> Batch:
    """The portraits start..start+size of a batch."""
    return {name: value[start : start + size] for name, value in batch.items()}
