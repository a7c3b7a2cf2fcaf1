"""Instructions: what to change in a portrait, or to take over from a second one, and the result.

`instruct` writes an order for one reference ("make the hat green"), `combine` one for two
("the person of image 1 with the hat of image 2"). The pictures themselves are drawn from the rows.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from training.attributes import ATTRIBUTES, HELD_OUT_PAIRS, Batch, held_out, sample
from training.captions import FACES, HAIR_WORDS, HATS, MOODS, PATTERNS, SKIN_WORDS, WEARS, Row, rows
from training.draw import LOOKS

HAT_NAMES = {
    "brimmed hat": ("brimmed hat", "fedora"),
    "beanie": ("beanie", "knit cap"),
    "cap": ("cap", "baseball cap"),
    "party hat": ("party hat", "cone hat"),
}
WEAR_NAMES = {
    "t-shirt": ("t-shirt", "tee"),
    "hoodie": ("hoodie", "hooded sweatshirt"),
    "sweater": ("sweater", "turtleneck", "pullover"),
    "collared shirt": ("collared shirt", "button-up shirt"),
}
VERBS = {
    "smiling": ("smile", "look happy"),
    "laughing": ("laugh", "grin"),
    "serious": ("look serious", "look calm"),
    "sad": ("look sad", "cry"),
    "surprised": ("look surprised", "look shocked"),
    "winking": ("wink",),
}
CUTS = ("bun", "ponytail", "bob")
WORN = ("hat", "glasses", "scarf", "earrings")
RECOLOUR = (
    "make the {thing} {colour}",
    "make the {thing} {colour}",
    "make the {thing} {colour}",
    "make {their} {thing} {colour}",
    "change the {thing} to {colour}",
    "change the {thing} to {colour}",
    "change {their} {thing} to {colour}",
    "change the color of the {thing} to {colour}",
    "change the color of {their} {thing} to {colour}",
    "change the {thing} color to {colour}",
    "turn the {thing} {colour}",
    "the {thing} should be {colour}",
    "recolor the {thing} {colour}",
)
ADD = ("add {thing}", "add {thing}", "give {them} {thing}", "{they} should have {thing}")
ADD_WORN = (
    *ADD,
    "put {thing} on {them}",
    "make {them} wear {thing}",
    "let {them} wear {thing}",
    "{they} should wear {thing}",
)
REMOVE = (
    "remove the {thing}",
    "remove the {thing}",
    "remove the {thing}",
    "remove {their} {thing}",
    "delete the {thing}",
    "get rid of the {thing}",
    "erase the {thing}",
    "without the {thing}",
    "no {thing}",
)
REMOVE_WORN = (*REMOVE, "take off the {thing}", "take the {thing} off", "take off {their} {thing}")
EXCHANGE = (
    "change the {old} to {new}",
    "replace the {old} with {new}",
    "swap the {old} for {new}",
    "turn the {old} into {new}",
)
BEHIND = (
    "change the background to {new}",
    "replace the background with {new}",
    "put {them} in front of {new}",
    "put {them} in front of {new}",
    "place {them} on {new}",
    "set the background to {new}",
    "move {them} in front of {new}",
)
SUBJECTS = (
    "the same {who}",
    "the same {who}",
    "the same person",
    "this {who}",
    "the {who} in image 1",
    "the {who} of image 1",
    "the {who} from image 1",
    "the person from image 1",
    "the person in image 1",
    "image 1",
)
BEFORE = ("please ", "in image 1, ", "edit image 1: ", "in this picture, ", "edit the image: ")
AFTER = (
    ", keep everything else the same",
    ", keep everything else unchanged",
    " and keep the rest",
    ", but leave everything else as it is",
    ", while keeping the same person",
    ", while keeping the face and pose unchanged",
    ". Keep everything else the same",
    ". Everything else stays unchanged",
)
BORROWED: dict[str, tuple[str, ...]] = {
    "hat": ("hat", "hat_color"),
    "glasses": ("glasses",),
    "scarf": ("scarf", "scarf_color"),
    "clothes": ("wear", "wear_color"),
    "background": ("background", "pattern"),
    "hair": ("hair", "style"),
    "expression": ("expression",),
    "look": (),
}
"""What can be taken over from another reference, and the attributes that move with it."""

BORROWED_SHARES = (0.32, 0.14, 0.22, 0.18, 0.18, 0.14, 0.11, 0.14)
ORIGINS = ("person", *BORROWED)
"""What an instruction can take from a reference; the text encoder learns from which one."""

BORROW = (
    "the {who} of {one} with the {thing} of {two}",
    "the {who} of {one} with the {thing} of {two}",
    "the {who} from {one} with the {thing} from {two}",
    "the {who} in {one} with the {thing} in {two}",
    "{one} with the {thing} of {two}",
    "give the {who} in {one} the {thing} from {two}",
    "use the {thing} of {two} for the {who} in {one}",
)
BORROW_WORN = (
    *BORROW,
    "the {who} from {one} wearing the {thing} from {two}",
    "the {who} of {one} wears the {thing} of {two}",
    "put the {thing} from {two} on the {who} in {one}",
    "take the {thing} from {two} and put it on the {who} in {one}",
)
BORROW_BEHIND = (
    *BORROW,
    "put the {who} from {one} in front of the background of {two}",
    "the {who} of {one} on the background of {two}",
    "replace the background of {one} with the background of {two}",
)
BORROW_LOOK = (
    "{one} in the style of {two}",
    "{one} in the style of {two}",
    "the {who} of {one} in the style of {two}",
    "redraw {one} in the style of {two}",
    "apply the style of {two} to {one}",
    "transform {one} into the style of {two}",
)
SHORT = {
    "worn": (
        "with the {thing} of {two}",
        "add the {thing} from {two}",
        "put on the {thing} of {two}",
    ),
    "other": ("with the {thing} of {two}", "use the {thing} from {two}"),
    "look": ("in the style of {two}", "in the style of {two}", "use the style of {two}"),
}
"""Forms that leave image 1 unsaid."""

IMAGES = {
    1: ("image 1", "image 1", "image 1", "the first image", "picture 1"),
    2: ("image 2", "image 2", "image 2", "the second image", "picture 2"),
}


@dataclass(frozen=True)
class Change:
    """One change to a portrait.

    Attributes:
        values: the attributes' new values.
        order: the change as an order ("make the hat green").
        state: the change as its result ("with a green hat").
        loose: attributes whose exact value the words leave open.
    """

    values: Row
    order: str
    state: str
    loose: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Edit:
    """An instruction and the portrait that it leads to.

    Attributes:
        text: the prompt.
        row: the resulting portrait.
        changed: attributes that differ from the person's reference.
        loose: those of them whose exact value the prompt leaves open.
        person: number of the reference that shows the person.
        borrowed: what comes from the other reference, if there is one.
    """

    text: str
    row: Row
    changed: frozenset[str]
    loose: frozenset[str] = frozenset()
    person: int = 1
    borrowed: tuple[str, ...] = ()
    origins: dict[str, int] = field(default_factory=dict)


def _article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _index(row: Row, name: str) -> int:
    return ATTRIBUTES[name].index(row[name])


def unseen(row: Row) -> bool:
    """Whether a portrait has a colour pair that no training picture may show."""
    for first, second in HELD_OUT_PAIRS:
        hatless = first == "hat_color" and row["hat"] == "none"
        if not hatless and held_out(_index(row, first), _index(row, second)):
            return True
    return False


def to_batch(table: list[Row]) -> Batch:
    """Rows of value names as index tensors; the inverse of `captions.rows`."""
    return {name: torch.tensor([_index(row, name) for row in table]) for name in ATTRIBUTES}


class Editor:
    """Draws random changes of one portrait and puts them into words."""

    def __init__(self, row: Row, rng: random.Random) -> None:
        self.row, self.rng = row, rng
        own = ("she", "her", "her") if row["who"] == "woman" else ("he", "him", "his")
        known = rng.random() < 0.75
        self.they, self.them, self.their = own if known else ("the person", "the person", "the")
        self.who = row["who"] if rng.random() < 0.6 else "person"

    def say(self, forms: tuple[str, ...], **words: str) -> str:
        """One of some sentence forms, filled in."""
        form = self.rng.choice(forms)
        return form.format(they=self.they, them=self.them, their=self.their, **words)

    def other(self, name: str) -> str:
        """A value of an attribute that the portrait does not have, nor `none`."""
        values = [v for v in ATTRIBUTES[name] if v not in ("none", self.row[name])]
        return self.rng.choice(values)

    def colour(self, name: str, value: str) -> str:
        """A word for a colour of an attribute."""
        tables = {"hair": HAIR_WORDS, "skin": SKIN_WORDS}
        words = tables.get(name, {}).get(value, (value,))
        return self.rng.choice(("gray", "grey")) if value == "gray" else self.rng.choice(words)

    def noun(self, name: str) -> str:
        """The thing that an attribute or its colour belongs to, as the reference shows it."""
        kinds = {"hat": HATS, "wear": WEARS}
        kind = name.removesuffix("_color")
        noun = self.rng.choice(kinds[kind][self.row[kind]]) if kind in kinds else kind
        if kind == "glasses":
            noun = self.row["glasses"]
        if name.endswith("_color") and self.rng.random() < 0.15:
            return f"{self.row[name]} {noun}"
        return noun

    def recolour(self, name: str) -> Change | None:
        """Another colour of something that is there."""
        absent = name in ("hat_color", "scarf_color") and self.row[name[:-6]] == "none"
        if absent or (name == "eyes" and self.row["glasses"] == "sunglasses"):
            return None
        value, noun = self.other(name), self.noun(name)
        word = self.colour(name, value)
        bare = noun.removeprefix(f"{self.row[name]} ")
        thing = f"{word} {bare}"
        state = f"with {thing}"
        if name.endswith("_color"):
            state = self.rng.choice((f"with {_article(thing)}", f"wearing {_article(thing)}"))
        return Change({name: value}, self.say(RECOLOUR, thing=noun, colour=word), state)

    def background(self) -> Change:
        """Another background: its colour, in half of the cases with a pattern."""
        value = self.other("background")
        word, values = self.colour("background", value), {"background": value}
        if self.rng.random() < 0.35:
            values["pattern"] = self.rng.choice(ATTRIBUTES["pattern"])
            words = self.rng.choice(PATTERNS[values["pattern"]]).format(c=word)
        elif self.rng.random() < 0.45:
            order = self.say(
                RECOLOUR[:3] + RECOLOUR[4:6] + RECOLOUR[10:], thing="background", colour=word
            )
            return Change(values, order, f"on {_article(word)} background")
        else:
            words = f"{word} background"
        front = self.rng.choice(("in front of", "on", "against"))
        return Change(values, self.say(BEHIND, new=_article(words)), f"{front} {_article(words)}")

    def pattern(self) -> Change:
        """Another pattern on the same background."""
        value = self.other("pattern")
        if value == "plain":
            noun = self.rng.choice((self.row["pattern"], "pattern"))
            forms = ("remove the {x} from the background", "make the background plain")
            return Change({"pattern": value}, self.say(forms, x=noun), "on a plain background")
        forms = ("add {x} to the background", "put {x} on the background", "background with {x}")
        return Change({"pattern": value}, self.say(forms, x=value), f"on a background with {value}")

    def expression(self) -> Change:
        """Another mood."""
        value = self.other("expression")
        mood, verb = self.rng.choice(MOODS[value]), self.rng.choice(VERBS[value])
        forms = (
            "make {them} {verb}",
            "make {them} {verb}",
            "make {them} {mood}",
            "change the expression to {mood}",
            "change {their} expression to {mood}",
            "{they} should be {mood}",
            "let {them} {verb}",
        )
        state = self.rng.choice((mood, mood, mood, f"with {self.rng.choice(FACES[value])}"))
        return Change({"expression": value}, self.say(forms, mood=mood, verb=verb), state)

    def hairstyle(self) -> Change:
        """Another hair style, now and then with another colour."""
        cut = self.other("style")
        values, word = {"style": cut}, ""
        if self.rng.random() < 0.3:
            values["hair"] = self.other("hair")
            word = self.colour("hair", values["hair"]) + " "
        new = f"a {word}{cut}" if cut in CUTS else f"{cut} {word}hair"
        forms = ("give {them} {new}", "change the hair to {new}", "change the hairstyle to {new}")
        return Change(values, self.say(forms, new=new), f"with {new}")

    def exchange(self, name: str) -> Change | None:
        """Another kind of hat or clothing, in half of the cases in another colour."""
        if self.row[name] == "none":
            return None
        names = {"hat": HAT_NAMES, "wear": WEAR_NAMES}[name]
        kind = self.other(name)
        values, new = {name: kind}, self.rng.choice(names[kind])
        if self.rng.random() < 0.5:
            values[f"{name}_color"] = colour = self.rng.choice(ATTRIBUTES["wear_color"])
            new = f"{colour} {new}"
        forms = (*EXCHANGE, "dress {them} in {new}") if name == "wear" else EXCHANGE
        order = self.say(forms, old=self.noun(name), new=_article(new))
        return Change(values, order, f"wearing {_article(new)}")

    def add(self, name: str) -> Change | None:
        """Something that is not there yet."""
        beardless = name == "beard" and self.row["who"] == "woman"
        if self.row[name] != "none" or beardless:
            return None
        values = {name: self.other(name)}
        thing, loose = values[name], set()
        if name == "hat":
            general = self.rng.random() < 0.4
            thing = "hat" if general else self.rng.choice(HAT_NAMES[thing])
            loose |= {"hat"} if general else set()
        if name in ("hat", "scarf"):
            values[f"{name}_color"] = colour = self.rng.choice(ATTRIBUTES["wear_color"])
            silent = self.rng.random() < 0.12
            loose |= {f"{name}_color"} if silent else set()
            thing = thing if silent else f"{colour} {thing}"
        thing = _article(thing) if name in ("hat", "scarf", "beard") else thing
        worn = name in WORN
        state = f"{self.rng.choice(('with', 'wearing') if worn else ('with',))} {thing}"
        order = self.say(ADD_WORN if worn else ADD, thing=thing)
        return Change(values, order, state, frozenset(loose))

    def remove(self) -> Change | None:
        """Something that is there."""
        names = [n for n in (*WORN, "beard", "freckles") if self.row[n] != "none"]
        if not names:
            return None
        name = self.rng.choice(names)
        noun = self.noun(f"{name}_color" if name in ("hat", "scarf") else name)
        bare = noun.split()[-1]
        without = self.rng.choice((f"without the {noun}", f"without {bare}", f"with no {bare}"))
        order = self.say(REMOVE_WORN if name in WORN else REMOVE, thing=noun)
        return Change({name: "none"}, order, without)

    def who(self) -> Change:
        """The same portrait as a man or a woman."""
        value = self.other("who")
        values = {"who": value} | ({"beard": "none"} if self.row["beard"] != "none" else {})
        forms = ("turn {them} into a {x}", "make it a {x}", "change the person to a {x}")
        return Change(values, self.say(forms, x=value), f"as a {value}")

    def change(self) -> Change:
        """A random change that fits the portrait."""
        while True:
            make = self.rng.choices(list(CHANGES), CHANGES.values())[0]
            if made := make(self):
                return made


CHANGES: dict[Callable[[Editor], Change | None], float] = {
    lambda e: e.recolour("hat_color"): 0.16,
    lambda e: e.recolour("wear_color"): 0.10,
    lambda e: e.recolour("hair"): 0.10,
    lambda e: e.recolour("eyes"): 0.06,
    lambda e: e.recolour("skin"): 0.05,
    lambda e: e.recolour("scarf_color"): 0.08,
    Editor.background: 0.14,
    Editor.pattern: 0.03,
    Editor.expression: 0.10,
    Editor.hairstyle: 0.06,
    lambda e: e.exchange("hat"): 0.06,
    lambda e: e.exchange("wear"): 0.05,
    lambda e: e.add("hat"): 0.12,
    lambda e: e.add("glasses"): 0.05,
    lambda e: e.add("scarf"): 0.09,
    lambda e: e.add("earrings"): 0.06,
    lambda e: e.add("beard"): 0.06,
    lambda e: e.add("freckles"): 0.05,
    Editor.remove: 0.16,
    Editor.who: 0.02,
}
"""The kinds of change and how often each is tried."""


def _finish(text: str, rng: random.Random) -> str:
    text = text[:1].upper() + text[1:] if rng.random() < 0.5 else text
    return text + ("." if rng.random() < 0.3 else "")


def _changes(editor: Editor) -> list[Change]:
    """One to three changes of different things."""
    count = editor.rng.choices((1, 2, 3), (0.70, 0.24, 0.06))[0]
    made, taken = [], set()
    while len(made) < count:
        change = editor.change()
        things = {name.removesuffix("_color") for name in change.values}
        if not things & taken:
            made.append(change)
            taken |= things
    return made


def _in_words(changes: list[Change], editor: Editor) -> str:
    rng = editor.rng
    if rng.random() < 0.38:
        subject = rng.choice(SUBJECTS).format(who=editor.who)
        return (
            subject
            + rng.choice((", ", " "))
            + rng.choice((", ", " and ")).join(change.state for change in changes)
        )
    text = rng.choice((", ", " and ", ", and ", ". ")).join(change.order for change in changes)
    text = rng.choice(BEFORE) + text if rng.random() < 0.12 else text
    return text + (rng.choice(AFTER) if rng.random() < 0.2 else "")


def instruct(row: Row, rng: random.Random, test: bool = False) -> Edit:
    """Write an instruction for a portrait; the result has no held-out pair, except for a test."""
    while True:
        editor = Editor(row, rng)
        changes = _changes(editor)
        values = {name: value for change in changes for name, value in change.values.items()}
        result = row | values
        woman_with_beard = result["who"] == "woman" and result["beard"] != "none"
        if woman_with_beard or (not test and unseen(result)):
            continue
        text = _finish(_in_words(changes, editor), rng)
        loose = frozenset().union(*(change.loose for change in changes))
        return Edit(text, result, frozenset(values), loose, origins={"person": 1})


def _borrow_words(thing: str, other: Row, rng: random.Random) -> str:
    nouns = {
        "hat": ("hat", "hat", *HATS[other["hat"]]) if other["hat"] != "none" else ("hat",),
        "glasses": (other["glasses"],),
        "clothes": ("clothes", "clothes", "outfit", *WEARS[other["wear"]]),
        "expression": ("expression", "expression", "mood"),
    }
    return rng.choice(nouns.get(thing, (thing,)))


def _borrow_text(thing: str, person: int, row: Row, other: Row, rng: random.Random) -> str:
    kind = "look" if thing == "look" else "worn" if thing in (*WORN, "clothes") else "other"
    forms = {"look": BORROW_LOOK, "worn": BORROW_WORN, "other": BORROW}[kind]
    forms = BORROW_BEHIND if thing == "background" else forms
    forms = SHORT[kind] if person == 1 and rng.random() < 0.15 else forms
    who = row["who"] if rng.random() < 0.35 else "person"
    one, two = rng.choice(IMAGES[person]), rng.choice(IMAGES[3 - person])
    noun = _borrow_words(thing, other, rng)
    return rng.choice(forms).format(who=who, one=one, two=two, thing=noun)


def combine(row: Row, other: Row, rng: random.Random, test: bool = False) -> Edit | None:
    """Write an instruction for the person of `row` and a thing of `other`.

    Returns:
        The edit; None if there is nothing to take over that makes an allowed portrait.
    """
    person = 2 if rng.random() < 0.2 else 1
    there = [t for t in BORROWED if other.get(t, "") != "none"]
    shares = dict(zip(BORROWED, BORROWED_SHARES, strict=True))
    for _ in range(8):
        thing = rng.choices(there, [shares[t] for t in there])[0]
        values = {name: other[name] for name in BORROWED[thing]}
        result = row | values
        same = bool(values) and result == row
        if same or (not test and unseen(result)):
            continue
        text = _finish(_borrow_text(thing, person, row, other, rng), rng)
        origins = {"person": person, thing: 3 - person}
        changed = frozenset(name for name in values if result[name] != row[name])
        return Edit(text, result, changed, person=person, borrowed=(thing,), origins=origins)
    return None


@dataclass(frozen=True)
class Edits:
    """Sources, what they turn into, and the instructions; `others` are the second references.

    looks: index into `draw.LOOKS` (0 for none) of each second reference and its result.
    """

    sources: Batch
    targets: Batch
    edits: list[Edit]
    others: Batch | None = None
    looks: torch.Tensor | None = None


def make_edits(sources: Batch, seed: int, test: bool = False) -> Edits:
    """One instruction for each portrait of a batch."""
    rng = random.Random(seed)
    made = [instruct(row, rng, test) for row in rows(sources)]
    return Edits(sources, to_batch([edit.row for edit in made]), made)


def make_combinations(sources: Batch, seed: int, test: bool = False) -> Edits:
    """One two-reference instruction for each portrait of a batch, with a partner for each."""
    rng = random.Random(seed)
    spare = rows(sample(2 * len(sources["who"]), seed + 1, test))
    others, made = [], []
    for row in rows(sources):
        edit = None
        while edit is None:
            other = rng.choice(spare)
            edit = combine(row, other, rng, test)
        others.append(other)
        made.append(edit)
    looks = [rng.randrange(1, len(LOOKS)) if "look" in e.borrowed else 0 for e in made]
    targets = to_batch([edit.row for edit in made])
    return Edits(sources, targets, made, to_batch(others), torch.tensor(looks))


def origin_labels(edits: list[Edit]) -> torch.Tensor:
    """Which reference each thing comes from, (N, origins): 0 where none is named."""
    return torch.tensor([[edit.origins.get(name, 0) for name in ORIGINS] for edit in edits])
