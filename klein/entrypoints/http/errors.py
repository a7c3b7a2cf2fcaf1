"""klein's errors over HTTP: one status for each code, one shape for all."""

from typing import assert_never

from starlette.responses import JSONResponse, Response

from klein.errors import ErrorCode, KleinError


def http_status(code: ErrorCode) -> int:
    """The HTTP status of each error; a new code does not type-check until it has one."""
    match code:
        case ErrorCode.INVALID_REQUEST | ErrorCode.BAD_SETTING:
            return 400
        case ErrorCode.LORA_FAILED:
            return 422
        case ErrorCode.QUEUE_FULL:
            return 429
        case ErrorCode.CANCELLED:
            return 499
        case ErrorCode.INTERNAL | ErrorCode.OUTPUT_TOO_LARGE:
            return 500
        case ErrorCode.DELIVERY_FAILED | ErrorCode.IMAGE_UNAVAILABLE:
            return 502
        case ErrorCode.NOT_READY | ErrorCode.MODEL_UNAVAILABLE | ErrorCode.OUT_OF_MEMORY:
            return 503
        case ErrorCode.DEADLINE_EXCEEDED:
            return 504
    assert_never(code)


def error_response(error: KleinError, request_id: str | None = None) -> Response:
    """The one shape of klein's own errors."""
    headers = {"retry-after": "5"} if error.retryable else {}
    body = {"error": error.as_dict(request_id)}
    return JSONResponse(body, status_code=http_status(error.code), headers=headers)
