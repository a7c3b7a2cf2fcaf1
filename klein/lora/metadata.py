"""What is written about a LoRA: inside its file by trainers, and beside it by an operator.

Anybody may have written it, so every text is bounded in length and cleaned of what cannot be shown.
"""

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from klein.errors import LoraError
from klein.lora.spec import SCALE_RANGE
from klein.sources.safetensors import open_regular

MAX_TRIGGERS = 8
MAX_TRIGGER = 200
"""Characters of a trigger word; a line of prompt at most."""
MAX_CLAIM = 200
MAX_JSON = 4 * 1024 * 1024
"""Characters of a JSON text inside the metadata; tags of thousands of pictures take that much."""
MAX_DEFAULTS_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class LoraDefaults:
    """What an operator keeps beside a file: its own scale, its trigger word."""

    scale: float | None = None
    trigger: str | None = None


def trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The tags ai-toolkit and kohya write: {"1_name": {"word": count}}."""
    folders = _json(metadata.get("ss_tag_frequency", ""))
    words = (word for tags in folders.values() if isinstance(tags, dict) for word in tags)
    sound = (word.strip() for word in words if word.isprintable() and len(word) <= MAX_TRIGGER)
    return tuple(islice(dict.fromkeys(word for word in sound if word), MAX_TRIGGERS))


def training(metadata: Mapping[str, str]) -> dict[str, str]:
    """Claims worth showing; ai-toolkit and kohya write JSON into some of the strings."""
    found = {
        "base_model": metadata.get("ss_base_model_version", ""),
        "name": metadata.get("name", "") or metadata.get("ss_output_name", ""),
        "alpha": metadata.get("ss_network_alpha", ""),
    }
    for key, inner in (("training_info", ("step", "epoch")), ("software", ("name", "version"))):
        stored = _json(metadata.get(key, ""))
        found |= {
            f"{key}_{name}": str(stored[name])
            for name in inner
            if isinstance(stored.get(name), str | int | float)
        }
    return {key: _claim(value) for key, value in found.items() if value}


def _json(text: str) -> dict[str, Any]:
    """A JSON object out of a string of the metadata; empty for anything else."""
    if len(text) > MAX_JSON:
        return {}
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return stored if isinstance(stored, dict) else {}


def _claim(text: str) -> str:
    shown = text[:MAX_CLAIM].encode("utf-8", "replace").decode()
    return "".join(letter if letter.isprintable() else " " for letter in shown)


def defaults(path: Path) -> LoraDefaults:
    """What is kept beside the LoRA at `path`, `scale` and `trigger` in a .toml file of the same
    name; raises LoraError for a file that says anything else."""
    beside = path.with_suffix(".toml")
    try:
        with open_regular(beside) as file:
            raw = file.read(MAX_DEFAULTS_BYTES + 1)
    except FileNotFoundError:
        return LoraDefaults()
    except OSError as error:
        raise LoraError(f"{beside.name}: it cannot be read ({error.strerror})") from error
    try:
        if len(raw) > MAX_DEFAULTS_BYTES:
            raise ValueError("it is too large")
        stored = tomllib.loads(raw.decode())
        made = LoraDefaults(
            _scale(stored.pop("scale", None)), _trigger(stored.pop("trigger", None))
        )
        if stored:
            raise ValueError("only scale (a number) and trigger (a text) belong there")
    except (ValueError, RecursionError) as error:
        raise LoraError(f"{beside.name}: {str(error)[:200]}") from error
    return made


def _scale(stored: object) -> float | None:
    if stored is None:
        return None
    low, high = SCALE_RANGE
    if isinstance(stored, bool) or not isinstance(stored, int | float):
        raise ValueError("scale must be a number")
    if not (math.isfinite(stored) and low <= stored <= high):
        raise ValueError(f"scale must be between {low:g} and {high:g}")
    return float(stored)


def _trigger(stored: object) -> str | None:
    if stored is None:
        return None
    if not isinstance(stored, str) or not stored.isprintable() or len(stored) > MAX_TRIGGER:
        raise ValueError(f"trigger must be one line of at most {MAX_TRIGGER} characters")
    return stored.strip() or None
