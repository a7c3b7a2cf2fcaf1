"""Filters, as an operator would write them; `KLEIN_FILTER=tests.support.filters:judge`."""

import threading
import time
from collections.abc import Callable
from typing import Any

from PIL import Image

from klein.app.filter import Check, Mark, Refuse, Verdict

seen: list[tuple[Check, str]] = []
"""What was asked, and in which thread."""
released = threading.Event()
"""Ends a filter that hangs."""
NOT_CALLABLE = 1
RED = (255, 0, 0)


def judge(check: Check) -> Any:
    """Obeys the prompt's first word, and refuses images of seed 2 (as the fake pipeline draws
    them) and pictures that begin with red."""
    seen.append((check, threading.current_thread().name))
    order = check.prompt.split()[0]
    if check.stage == "image" and order in IMAGES:
        return IMAGES[order](check)
    if check.stage == "request" and order in REQUESTS:
        return REQUESTS[order](check)
    if any(image.getpixel((0, 0)) in (RED, (2, 14, 62)) for image in check.images):
        return Refuse("I do not like its colour")
    return None


def fail(_: Check) -> Verdict:
    """Raise something that knows a secret."""
    raise OSError("/secret/path")


def leave(_: Check) -> Verdict:
    raise SystemExit


def hang(_: Check) -> Verdict:
    released.wait(10)
    return None


async def later(_: Check) -> Verdict:
    return None


def slow(_: Check) -> Verdict:
    time.sleep(0.3)
    return None


def scrawl(check: Check) -> Verdict:
    """Draw on what was handed in, and let it pass."""
    check.images[0].paste(RED, (0, 0, *check.images[0].size))
    return None


IMAGES: dict[str, Callable[[Check], Any]] = {
    "stamp": lambda check: Mark("stamped", Image.new("RGB", check.images[0].size, RED)),
    "label": lambda check: Mark("labelled"),
    "shrink": lambda check: Mark("too small", Image.new("RGB", (1, 1))),
    "never": lambda check: Refuse("never"),
    "scrawl": scrawl,
    "fail-late": fail,
    "hang-late": hang,
}
REQUESTS: dict[str, Callable[[Check], Any]] = {
    "bad": lambda check: Refuse("a bad word " + "!" * 1000, field="prompt"),
    "garbled": lambda check: Refuse("half\ud800a\x1b[31m\npair", field=object()),  # type: ignore[arg-type]
    "odd": lambda check: Mark("an odd word"),
    "fail": fail,
    "leave": leave,
    "hang": hang,
    "slow": slow,
    "wrong": lambda check: "no",
}
