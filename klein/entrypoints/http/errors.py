"""klein's errors over HTTP: one status for each code, one shape for all."""

import math
from typing import Any, assert_never

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from klein.errors import ErrorCode, InvalidRequest, KleinError
from klein.request.schema import invalid

RETRY_SECONDS = 5.0
"""After which a caller may try again, where nothing better is known."""


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
        case ErrorCode.NOT_FOUND:
            return 404
        case ErrorCode.CONFLICT:
            return 409
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
        case ErrorCode.LORA_UNAVAILABLE:
            return 503
        case ErrorCode.NOT_READY | ErrorCode.MODEL_UNAVAILABLE | ErrorCode.OUT_OF_MEMORY:
            return 503
        case ErrorCode.DEADLINE_EXCEEDED:
            return 504
    assert_never(code)


def error_response(
    error: KleinError, request_id: str | None = None, retry_after: float | None = None
) -> Response:
    """The one shape of klein's own errors; `retry_after` is in seconds."""
    seconds = math.ceil(max(1.0, RETRY_SECONDS if retry_after is None else retry_after))
    headers = {"retry-after": str(seconds)} if error.retryable else {}
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


def install(app: FastAPI) -> None:
    """Give what routes raise, and what FastAPI refuses by itself, the same shape."""
    app.add_exception_handler(KleinError, _on_klein_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)


async def _on_klein_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, KleinError)
    generator = request.app.state.generator
    full = error.code is ErrorCode.QUEUE_FULL and generator is not None
    return error_response(error, retry_after=generator.retry_after() if full else None)


async def _on_invalid(_: Request, error: Exception) -> Response:
    """The field without the part of the request that it is in."""
    assert isinstance(error, RequestValidationError)
    errors = [{**row, "loc": row["loc"][1:]} for row in error.errors()]
    if errors[0]["type"] == "json_invalid":
        return error_response(InvalidRequest("the body is not JSON"))
    return error_response(invalid(errors))


async def _on_http(_: Request, error: Exception) -> Response:
    """Unknown paths and methods."""
    assert isinstance(error, HTTPException)
    detail = {
        "code": {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http"),
        "message": str(error.detail),
        "field": None,
        "retryable": False,
        "request_id": None,
    }
    return JSONResponse({"error": detail}, status_code=error.status_code, headers=error.headers)
