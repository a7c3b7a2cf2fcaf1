"""One LoRA of a request, as the request names it."""

from dataclasses import dataclass

SCALE_RANGE = (-4.0, 4.0)
"""Of a request's scale, and of the one kept beside a file."""


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """One LoRA of a request. `scale` 1.0 is as trained, None the file's own default;
    `trigger` "auto" puts a missing trigger word in front of the prompt."""

    path: str
    scale: float | None = None
    weight_name: str | None = None
    revision: str | None = None
    trigger: str = "off"
