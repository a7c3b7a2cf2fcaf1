"""Captions for portraits: varied sentences that name all, some or none of the attributes."""

import random
from collections.abc import Callable

import torch

from training.attributes import ATTRIBUTES, Batch

Row = dict[str, str]
Named = tuple[str, list[str]]

HAIR_WORDS = {
    "blonde": ("blonde", "blonde", "blond", "golden"),
    "red": ("red", "red", "red", "ginger"),
    "white": ("white", "white", "silver"),
    "brown": ("brown", "brown", "chestnut"),
    "black": ("black", "black", "jet black"),
}
SKIN_WORDS = {
    "light": ("light", "fair", "pale"),
    "tan": ("tan", "tanned", "olive"),
    "brown": ("brown", "light brown"),
    "dark": ("dark", "dark", "deep brown"),
}
MOODS = {
    "smiling": ("smiling", "smiling", "happy", "cheerful", "friendly"),
    "laughing": ("laughing", "laughing", "grinning", "joyful"),
    "serious": ("serious", "serious", "calm", "stern"),
    "sad": ("sad", "sad", "unhappy", "crying"),
    "surprised": ("surprised", "surprised", "shocked", "amazed"),
    "winking": ("winking",),
}
FACES = {
    "smiling": ("a smile", "a warm smile"),
    "laughing": ("a big grin", "a big laugh", "an open mouth"),
    "serious": ("a serious face", "a straight face"),
    "sad": ("a sad face", "a tear"),
    "surprised": ("a surprised look", "a surprised face"),
    "winking": ("a wink", "one eye closed"),
}
PEOPLE = {
    "woman": ("woman", "woman", "woman", "girl", "young woman", "lady", "female character"),
    "man": ("man", "man", "man", "boy", "young man", "guy", "male character"),
    "": ("person", "person", "character", "someone", "cartoon character", "figure"),
}
HATS = {
    "brimmed hat": ("hat", "hat", "brimmed hat", "fedora", "wide hat", "top hat"),
    "beanie": ("hat", "beanie", "beanie", "knit cap", "woolly hat"),
    "cap": ("cap", "cap", "baseball cap", "hat"),
    "party hat": ("party hat", "party hat", "cone hat", "hat"),
}
WEARS = {
    "t-shirt": ("t-shirt", "t-shirt", "tee", "shirt", "top"),
    "hoodie": ("hoodie", "hoodie", "hooded sweatshirt"),
    "sweater": ("sweater", "sweater", "turtleneck", "pullover", "jumper"),
    "collared shirt": ("collared shirt", "button-up shirt", "shirt", "shirt", "blouse"),
}
PATTERNS = {
    "plain": ("plain {c} background", "simple {c} background", "solid {c} background"),
    "dots": ("{c} background with dots", "dotted {c} background", "{c} polka dot background"),
    "stripes": ("striped {c} background", "{c} background with stripes"),
    "rays": ("{c} background with rays", "{c} sunburst background", "{c} background with sun rays"),
}
OPENINGS = (
    "a portrait of",
    "portrait of",
    "a cartoon of",
    "a picture of",
    "a drawing of",
    "photo of",
    "portrait photo of",
    "an illustration of",
    "a photo of",
    "cartoon portrait of",
    "headshot of",
    "a cartoon portrait of",
    "an image of",
    "close-up of",
    "digital art of",
    "a painting of",
)
FLUFF = (
    "high quality",
    "highly detailed",
    "cute",
    "soft light",
    "studio lighting",
    "masterpiece",
    "best quality",
    "cartoon style",
    "4k",
    "looking at the camera",
    "vector art",
    "beautiful",
    "flat colors",
    "professional",
    "detailed face",
    "avatar",
    "profile picture",
    "sharp focus",
)
PLAIN = (
    "a portrait",
    "portrait",
    "a person",
    "a cartoon portrait",
    "a face",
    "a character",
    "a cartoon character",
    "a picture of someone",
    "an avatar",
    "a drawing of a person",
)
STRIKING = ("hat", "glasses", "scarf", "earrings", "beard", "pattern")
"""Things that a caption names nearly always when they are there, so that silence means absence."""
SYLLABLES = ("ba", "ko", "mi", "ra", "zu", "len", "tor", "vi", "sa", "do", "qui", "ne", "fi", "xo")


def rows(batch: Batch) -> list[Row]:
    """Turn index tensors into one dict of value names per portrait."""
    columns = {name: tensor.tolist() for name, tensor in batch.items()}
    count = len(columns["who"])
    return [{name: ATTRIBUTES[name][columns[name][i]] for name in ATTRIBUTES} for i in range(count)]


def _article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _join(parts: list[str], rng: random.Random) -> str:
    if len(parts) < 2:
        return "".join(parts)
    return ", ".join(parts[:-1]) + rng.choice((" and ", " and ", ", and ", ", ")) + parts[-1]


class Phrases:
    """The parts of one caption, and the attributes that were really named in it."""

    def __init__(self, row: Row, share: float, rng: random.Random) -> None:
        self.row, self.rng = row, rng
        self.wanted = {name for name in ATTRIBUTES if rng.random() < share}
        striking = [name for name in STRIKING if row[name] not in ("none", "plain")]
        self.wanted |= {name for name in striking if rng.random() < 0.92}
        self.named: set[str] = set()

    def take(self, *names: str) -> bool:
        """Say whether all attributes are wanted, and note them as named if so."""
        if not self.wanted.issuperset(names):
            return False
        self.named.update(names)
        return True

    def pick(self, table: dict[str, tuple[str, ...]], name: str) -> str:
        """A random word for the attribute's value."""
        value = self.row[name]
        return self.rng.choice(table.get(value, (value,)))

    def looks(self) -> list[str]:
        """Hair, eyes, skin, beard, freckles."""
        parts = []
        colour, style = self.take("hair"), self.take("style")
        hair, cut = self.pick(HAIR_WORDS, "hair"), self.row["style"]
        if colour and style:
            if cut in ("bun", "ponytail", "bob"):
                parts.append(self.rng.choice((f"{hair} hair in a {cut}", f"a {hair} {cut}")))
            else:
                parts.append(self.rng.choice((f"{cut} {hair} hair",) * 4 + (f"{hair} {cut} hair",)))
        elif colour:
            parts.append(f"{hair} hair")
        elif style:
            parts.append(f"a {cut}" if cut in ("bun", "ponytail", "bob") else f"{cut} hair")
        if self.row["glasses"] != "sunglasses" and self.take("eyes"):
            parts.append(f"{self.row['eyes']} eyes")
        if self.take("skin"):
            parts.append(f"{self.pick(SKIN_WORDS, 'skin')} skin")
        if self.row["beard"] == "beard" and self.take("beard"):
            parts.append("a beard")
        if self.row["freckles"] == "freckles" and self.take("freckles"):
            parts.append("freckles")
        self.rng.shuffle(parts)
        return parts

    def _coloured(self, kind: str, colour: str, words: str) -> str | None:
        kind_wanted, colour_wanted = self.take(kind), self.take(colour)
        if colour_wanted:
            self.named.add(kind)
            return _article(f"{self.row[colour]} {words}")
        return _article(words) if kind_wanted else None

    def clothes(self) -> list[str]:
        """Clothing, hat, scarf, glasses, earrings, and now and then what is absent."""
        row, parts = self.row, []
        wear = self.pick(WEARS, "wear")
        parts.append(self._coloured("wear", "wear_color", wear))
        if row["hat"] != "none":
            parts.append(self._coloured("hat", "hat_color", self.pick(HATS, "hat")))
        if row["scarf"] != "none":
            parts.append(self._coloured("scarf", "scarf_color", "scarf"))
        if row["glasses"] != "none" and self.take("glasses"):
            words = {"glasses": ("glasses", "round glasses"), "sunglasses": ("sunglasses",)}
            parts.append(self.rng.choice(words[row["glasses"]]))
        if row["earrings"] != "none" and self.take("earrings"):
            parts.append(self.rng.choice(("earrings", "gold earrings")))
        found = [part for part in parts if part]
        self.rng.shuffle(found)
        return found

    def absent(self) -> list[str]:
        """Say in a few captions that there is no hat, glasses, scarf or earrings."""
        parts = []
        for name in ("hat", "glasses", "scarf", "earrings", "beard"):
            if self.row[name] == "none" and self.rng.random() < 0.05:
                self.named.add(name)
                parts.append(self.rng.choice((f"no {name}", f"without {name}")))
        return parts

    def background(self) -> str:
        """The background's colour, with its pattern in half of the cases."""
        if not self.take("background"):
            return ""
        colour = self.row["background"]
        colour = self.rng.choice(("gray", "grey")) if colour == "gray" else colour
        if self.take("pattern"):
            return self.rng.choice(PATTERNS[self.row["pattern"]]).format(c=colour)
        return colour + self.rng.choice((" background",) * 4 + (" backdrop", " wall"))

    def subject(self) -> str:
        """Who it is, with the mood as an adjective now and then."""
        who = self.row["who"] if self.take("who") else ""
        words = self.rng.choice(PEOPLE[who])
        if "expression" in self.wanted and self.rng.random() < 0.7:
            self.take("expression")
            words = f"{self.pick(MOODS, 'expression')} {words}"
        if self.rng.random() < 0.12:
            words = f"{words} named {''.join(self.rng.choices(SYLLABLES, k=2))}"
        return words if words == "someone" else _article(words)

    def mood(self) -> str:
        """The expression as a noun, if it is wanted and was not said yet."""
        if "expression" in self.named or not self.take("expression"):
            return ""
        return self.pick(FACES, "expression")


def _sentence(p: Phrases) -> str:
    rng = p.rng
    text = p.subject()
    if rng.random() < 0.4:
        text = f"{rng.choice(OPENINGS)} {text}"
    looks, clothes, mood, behind = p.looks(), p.clothes(), p.mood(), p.background()
    if mood:
        looks.append(mood)
    if rng.random() < 0.25:
        looks, clothes = looks + clothes, []
        rng.shuffle(looks)
    text += f" with {_join(looks, rng)}" if looks else ""
    link = rng.choice((", wearing ", " wearing ", " in ", ", dressed in ", " and wears "))
    text += link + _join(clothes, rng) if clothes else ""
    text += "".join(f", {part}" for part in p.absent())
    if behind:
        front = rng.choice((", on ", " on ", ", against ", ", in front of "))
        text = text + front + _article(behind) if rng.random() < 0.8 else f"{text}, {behind}"
    return text


def _tags(p: Phrases) -> str:
    parts = [p.subject(), *p.looks(), *p.clothes(), *p.absent(), p.mood(), p.background()]
    parts = [part for part in parts if part]
    if p.rng.random() < 0.5:
        p.rng.shuffle(parts)
    if p.rng.random() < 0.4:
        parts = [part.removeprefix("a ").removeprefix("an ") for part in parts]
    if p.rng.random() < 0.25 and len(parts) > 1 and not p.named & {"who", "expression"}:
        parts = [
            part for part in parts if "person" not in part and "character" not in part
        ] or parts
    return ", ".join(parts)


def _story(p: Phrases) -> str:
    rng = p.rng
    start = p.subject()
    text = f"{rng.choice(OPENINGS)} {start}" if rng.random() < 0.3 else start
    they = {"woman": "she", "man": "he"}.get(p.row["who"] if "who" in p.named else "", "they")
    has, wears = ("have", "wear") if they == "they" else ("has", "wears")
    looks, clothes, behind = p.looks(), p.clothes(), p.background()
    mood = p.mood()
    looks += [mood] if mood else []
    sentences = []
    if looks and rng.random() < 0.5:
        text += f" with {_join(looks, rng)}"
    elif looks:
        sentences.append(f"{they} {has} {_join(looks, rng)}")
    if clothes:
        sentences.append(f"{they} {wears} {_join(clothes, rng)}")
    if behind and behind.endswith(" background") and len(behind.split()) == 2:
        sentences.append(f"the background is {behind.split()[0]}")
    elif behind:
        sentences.append(f"behind is {_article(behind)}")
    return ". ".join([text, *sentences])


def _behind_first(p: Phrases) -> str:
    behind = p.background()
    p.wanted.discard("background")
    rest = _sentence(p)
    return f"on {_article(behind)}, {rest}" if behind else rest


FORMS: tuple[tuple[Callable[[Phrases], str], float], ...] = (
    (_sentence, 0.50),
    (_tags, 0.25),
    (_story, 0.15),
    (_behind_first, 0.10),
)


def _finish(text: str, rng: random.Random) -> str:
    if rng.random() < 0.15:
        text += ", " + ", ".join(rng.sample(FLUFF, rng.randint(1, 3)))
    if rng.random() < 0.3:
        text = ". ".join(part[:1].upper() + part[1:] for part in text.split(". "))
    if rng.random() < 0.02:
        text = text.title()
    return text + ("." if rng.random() < 0.25 else "")


def caption(row: Row, rng: random.Random) -> Named:
    """Write one caption.

    Returns:
        The text, and the names of the attributes that it mentions.
    """
    kind = rng.random()
    if kind < 0.03:
        return _finish(rng.choice(PLAIN), rng), []
    share = 1.0 if kind < 0.2 else rng.uniform(0.1, 1.0)
    phrases = Phrases(row, share, rng)
    form = rng.choices([f for f, _ in FORMS], [w for _, w in FORMS])[0]
    text = form(phrases)
    return _finish(text, rng), sorted(phrases.named)


def full_caption(row: Row, rng: random.Random) -> Named:
    """Write a sentence that mentions every attribute that shows."""
    phrases = Phrases(row, 1.0, rng)
    return _sentence(phrases), sorted(phrases.named)


def labels(batch: Batch, named: list[list[str]]) -> torch.Tensor:
    """Class targets (N, attributes): 0 where a caption is silent, else the value's index plus 1."""
    table = torch.stack([batch[name] for name in ATTRIBUTES], dim=1) + 1
    order = list(ATTRIBUTES)
    mask = torch.zeros_like(table, dtype=torch.bool)
    for i, names in enumerate(named):
        for name in names:
            mask[i, order.index(name)] = True
    return table * mask
