"""The exit code of each error."""

from typing import assert_never

from klein.errors import ErrorCode

OK, CALLERS_FAULT, BROKEN, TRY_AGAIN, INTERRUPTED = 0, 2, 70, 75, 130


def exit_code(code: ErrorCode) -> int:
    """The exit code of each error; a new code does not type-check until it has one."""
    match code:
        case ErrorCode.INVALID_REQUEST | ErrorCode.LORA_FAILED | ErrorCode.BAD_SETTING:
            return CALLERS_FAULT
        case ErrorCode.UNAUTHORIZED | ErrorCode.FORBIDDEN | ErrorCode.REQUEST_TOO_LARGE:
            return CALLERS_FAULT
        case ErrorCode.NOT_FOUND | ErrorCode.CONFLICT | ErrorCode.REFUSED_BY_FILTER:
            return CALLERS_FAULT
        case ErrorCode.MODEL_UNAVAILABLE | ErrorCode.INTERNAL | ErrorCode.OUTPUT_TOO_LARGE:
            return BROKEN
        case ErrorCode.DELIVERY_REFUSED:
            return BROKEN
        case ErrorCode.NOT_READY | ErrorCode.QUEUE_FULL | ErrorCode.DEADLINE_EXCEEDED:
            return TRY_AGAIN
        case ErrorCode.OUT_OF_MEMORY | ErrorCode.DELIVERY_FAILED | ErrorCode.IMAGE_UNAVAILABLE:
            return TRY_AGAIN
        case ErrorCode.REQUEST_TOO_SLOW | ErrorCode.LORA_UNAVAILABLE | ErrorCode.FILTER_FAILED:
            return TRY_AGAIN
        case ErrorCode.CANCELLED:
            return INTERRUPTED
    assert_never(code)
