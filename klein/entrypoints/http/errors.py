"""klein's errors over HTTP: one status for each code, one shape for all."""

from typing import Any, assert_never

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from klein.errors import ErrorCode, KleinError
from klein.request.schema import first_error


def http_status(code: ErrorCode) -> int:
    """The HTTP status of each error; a new code does not type-check until it has one."""
    match code:
        case ErrorCode.INVALID_REQUEST | ErrorCode.BAD_SETTING:
            return 400
        case ErrorCode.UNAUTHORIZED:
            return 401
        case ErrorCode.FORBIDDEN:
            return 403
        case ErrorCode.REQUEST_TOO_SLOW:
            return 408
        case ErrorCode.REQUEST_TOO_LARGE:
            return 413
        case ErrorCode.LORA_FAILED:
            return 422
        case ErrorCode.QUEUE_FULL:
            return 429
        case ErrorCode.CANCELLED:
            return 499
        case ErrorCode.INTERNAL | ErrorCode.OUTPUT_TOO_LARGE:
            return 500
        case ErrorCode.DELIVERY_FAILED:
            return 502
        case ErrorCode.LORA_UNAVAILABLE:
            return 503
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


class ErrorDetail(BaseModel):
    """What went wrong and the way out."""

    code: ErrorCode
    message: str
    field: str | None = Field(description="what to change in the request")
    retryable: bool = Field(description="whether the same request can succeed later")
    request_id: str | None


class ErrorBody(BaseModel):
    """The shape of every error."""

    error: ErrorDetail


def _described() -> dict[int | str, dict[str, Any]]:
    codes: dict[int, list[str]] = {}
    for code in ErrorCode:
        codes.setdefault(http_status(code), []).append(f"`{code}`")
    return {
        status: {"model": ErrorBody, "description": ", ".join(names)}
        for status, names in sorted(codes.items())
    }


ERRORS = _described()
"""Every status of an error, for OpenAPI."""


async def on_invalid(_: Request, error: Exception) -> Response:
    """FastAPI's validation errors in klein's shape."""
    assert isinstance(error, RequestValidationError)
    return error_response(first_error(error.errors()))


async def on_http(_: Request, error: Exception) -> Response:
    """Unknown paths and methods in klein's shape."""
    assert isinstance(error, HTTPException)
    detail = {
        "code": {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http"),
        "message": str(error.detail),
        "field": None,
        "retryable": False,
        "request_id": None,
    }
    return JSONResponse({"error": detail}, status_code=error.status_code, headers=error.headers)
