"""Everything that can go wrong, as a tree. It knows no HTTP; entrypoints map `ErrorCode`.

KleinError
├── InvalidRequest       the caller's fault; `field` names what to change
├── LoraError            a LoRA that cannot be found, read or applied
│   └── LoraUnavailable  the network or the disk is in the way of a LoRA; it may not be, later
├── Unauthorized         no key, or a wrong one
├── Forbidden            a key without the right to do this, or a page of another origin
├── RequestTooLarge      more bytes than a route takes
├── RequestTooSlow       a body that did not arrive in time
├── ImageUnavailable     a picture whose address cannot be reached now
├── NotFound             there is no such thing, or it is gone, or it belongs to somebody else
├── Conflict             it cannot be done to the thing as it is now
├── BadSetting           an environment variable with a value that cannot work
├── ModelUnavailable     the model cannot be found, fetched or fitted into this machine
├── NotReady             the model is still loading, or the worker is being replaced
├── QueueFull            more jobs than the queue holds
├── DeadlineExceeded     the job ran out of time
├── Cancelled            the caller gave the job up
├── OutOfMemory          the picture did not fit into memory
├── RefusedByFilter      the operator's filter lets a request or its images not through
├── FilterFailed         the operator's filter raised, or gave no answer in time
├── OutputTooLarge       the result is larger than the platform carries
├── DeliveryFailed       the bucket did not take the picture; it may, later
│   └── DeliveryRefused  the bucket says no to its name, its keys or the picture
└── InternalError        a fault of klein itself
"""

from difflib import get_close_matches
from enum import StrEnum
from typing import ClassVar

MAX_NAME = 80
"""Characters of a caller's name in a message."""


class ErrorCode(StrEnum):
    """The closed list of codes that callers see."""

    INVALID_REQUEST = "invalid_request"
    LORA_FAILED = "lora_failed"
    LORA_UNAVAILABLE = "lora_unavailable"
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"
    REQUEST_TOO_LARGE = "request_too_large"
    REQUEST_TOO_SLOW = "request_too_slow"
    IMAGE_UNAVAILABLE = "image_unavailable"
    NOT_FOUND = "not_found"
    CONFLICT = "conflict"
    BAD_SETTING = "bad_setting"
    MODEL_UNAVAILABLE = "model_unavailable"
    NOT_READY = "not_ready"
    QUEUE_FULL = "queue_full"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    CANCELLED = "cancelled"
    OUT_OF_MEMORY = "out_of_memory"
    REFUSED_BY_FILTER = "refused_by_filter"
    FILTER_FAILED = "filter_failed"
    OUTPUT_TOO_LARGE = "output_too_large"
    DELIVERY_FAILED = "delivery_failed"
    DELIVERY_REFUSED = "delivery_refused"
    INTERNAL = "internal"


class KleinError(Exception):
    """Base of all errors; `str(error)` is one sentence that names the way out."""

    code: ClassVar[ErrorCode]
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field

    def as_dict(self, request_id: str | None = None) -> dict[str, object]:
        """The wire shape that every door shares."""
        return {
            "code": str(self.code),
            "message": str(self),
            "field": self.field,
            "retryable": self.retryable,
            "request_id": request_id,
        }


class InvalidRequest(KleinError):
    code = ErrorCode.INVALID_REQUEST


class LoraError(KleinError):
    code = ErrorCode.LORA_FAILED


class LoraUnavailable(LoraError):
    code = ErrorCode.LORA_UNAVAILABLE
    retryable = True


class Unauthorized(KleinError):
    code = ErrorCode.UNAUTHORIZED


class Forbidden(KleinError):
    code = ErrorCode.FORBIDDEN


class RequestTooLarge(KleinError):
    code = ErrorCode.REQUEST_TOO_LARGE


class RequestTooSlow(KleinError):
    code = ErrorCode.REQUEST_TOO_SLOW
    retryable = True


class ImageUnavailable(KleinError):
    code = ErrorCode.IMAGE_UNAVAILABLE
    retryable = True


class NotFound(KleinError):
    code = ErrorCode.NOT_FOUND


class Conflict(KleinError):
    code = ErrorCode.CONFLICT


class BadSetting(KleinError):
    code = ErrorCode.BAD_SETTING


class ModelUnavailable(KleinError):
    code = ErrorCode.MODEL_UNAVAILABLE


class NotReady(KleinError):
    code = ErrorCode.NOT_READY
    retryable = True


class QueueFull(KleinError):
    code = ErrorCode.QUEUE_FULL
    retryable = True


class DeadlineExceeded(KleinError):
    code = ErrorCode.DEADLINE_EXCEEDED
    retryable = True


class Cancelled(KleinError):
    code = ErrorCode.CANCELLED


class OutOfMemory(KleinError):
    code = ErrorCode.OUT_OF_MEMORY
    retryable = True


class RefusedByFilter(KleinError):
    code = ErrorCode.REFUSED_BY_FILTER


class FilterFailed(KleinError):
    code = ErrorCode.FILTER_FAILED
    retryable = True


class OutputTooLarge(KleinError):
    code = ErrorCode.OUTPUT_TOO_LARGE


class DeliveryFailed(KleinError):
    code = ErrorCode.DELIVERY_FAILED
    retryable = True


class DeliveryRefused(DeliveryFailed):
    code = ErrorCode.DELIVERY_REFUSED
    retryable = False


class InternalError(KleinError):
    code = ErrorCode.INTERNAL


def unknown(kind: str, name: str, known: list[str]) -> str:
    """One sentence for a name that is not in a table: the nearest known one, then all of them.

    A name longer than any of a table is cut off: it is the caller's, and costs time to compare.
    """
    name = name[:MAX_NAME]
    words = {word.lower(): full for full in reversed(known) for word in (full, *full.split("_"))}
    near = get_close_matches(name.lower(), list(words), n=1, cutoff=0.6)
    hint = f"did you mean {words[near[0]]!r}? " if near else ""
    return f"unknown {kind} {name!r}: {hint}known are {', '.join(known)}"
