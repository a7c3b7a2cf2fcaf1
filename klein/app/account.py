"""How a request ended: what its metrics, its line in the log and its trace are made of."""

import asyncio
import logging
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any

from klein.core import GenerationParams, GenerationResult
from klein.errors import ErrorCode, KleinError

log = logging.getLogger(__name__)

CALLER: ContextVar[str | None] = ContextVar("caller", default=None)
"""The name of the key that the request under way came with."""
OK = "ok"
OUTCOMES = (OK, *map(str, ErrorCode))


def outcome_of(error: BaseException) -> str:
    """One of OUTCOMES; `cancelled` if whoever waited left."""
    if isinstance(error, asyncio.CancelledError):
        return str(ErrorCode.CANCELLED)
    return str(error.code if isinstance(error, KleinError) else ErrorCode.INTERNAL)


@dataclass(slots=True)
class Account:
    """What is known of a request so far; `speed` is the tier that draws it, once it is resolved."""

    id: str
    params: GenerationParams | None = None
    speed: str = ""
    outcome: str = OK
    result: GenerationResult | None = None

    def facts(self) -> dict[str, Any]:
        """What may be told of it: nothing that a caller wrote."""
        told: dict[str, Any] = {"outcome": self.outcome}
        if params := self.params:
            told |= {"preset": params.preset, "speed": self.speed, "images": params.num_images}
            told |= {"width": params.width, "height": params.height}
            told |= {"steps": params.num_inference_steps, "loras": len(params.loras)}
        return told

    def log(self) -> None:
        """One line."""
        seconds = asdict(self.result.timings) if self.result else {}
        took = f" in {seconds['total']:.2f} s" if seconds else ""
        extra = {"fields": self.facts() | ({"seconds": seconds} if seconds else {})}
        log.info("request %s: %s%s", self.id, self.outcome, took, extra=extra)
