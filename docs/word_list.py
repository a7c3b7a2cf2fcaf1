"""An example of a filter: refuses prompts that have a word of a list in them.

`KLEIN_FILTER=docs.word_list:check` tries it; for use, copy it and make the list your own. It is an
example of the hook, not of good moderation: it knows no context, and sees no image.
"""

import re
import unicodedata

from klein.app.filter import Check, Refuse

WORDS = frozenset({"beheading", "gore", "nude"})


def check(asked: Check) -> Refuse | None:
    """None lets a request or an image pass. The negative prompt names what is not wanted."""
    if asked.stage != "request":
        return None
    found = WORDS.intersection(words(asked.prompt))
    if not found:
        return None
    return Refuse(f"not drawn here: {', '.join(sorted(found))}", field="prompt")


def words(text: str) -> list[str]:
    """The words of a text, however they are written: ＮＵＤＥ, Nude and nudé are nude, and so is a
    word with characters in it that cannot be seen."""
    plain = unicodedata.normalize("NFKD", text).casefold()
    letters = "".join(each for each in plain if unicodedata.category(each) not in ("Mn", "Cf"))
    return re.findall(r"[^\W_]+", letters)
