"""klein's errors over HTTP: one status for each code, one shape for all."""

import math
from collections.abc import Mapping
from typing import Any, Literal, assert_never, cast

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from klein.errors import ErrorCode, InternalError, InvalidRequest, KleinError
from klein.request.schema import invalid

RETRY_SECONDS = 5.0
"""After which a caller may try again, where nothing better is known."""
OPENAI_PATHS = "/v1/"
"""Routes that speak OpenAI's words, whose client repeats what fails unless it is told not to."""
COSTLY = (ErrorCode.DEADLINE_EXCEEDED, ErrorCode.FILTER_FAILED)
"""What may succeed later, and would cost as much again if it did not."""


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
        case ErrorCode.LORA_FAILED | ErrorCode.REFUSED_BY_FILTER:
            return 422
        case ErrorCode.QUEUE_FULL:
            return 429
        case ErrorCode.CANCELLED:
            return 499
        case ErrorCode.INTERNAL | ErrorCode.OUTPUT_TOO_LARGE:
            return 500
        case ErrorCode.DELIVERY_FAILED | ErrorCode.DELIVERY_REFUSED | ErrorCode.IMAGE_UNAVAILABLE:
            return 502
        case ErrorCode.LORA_UNAVAILABLE | ErrorCode.FILTER_FAILED:
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
    if error.code is ErrorCode.UNAUTHORIZED:
        headers["www-authenticate"] = "Bearer"
    return ErrorResponse(error.as_dict(request_id), http_status(error.code), headers)


class ErrorResponse(JSONResponse):
    """One error; on OpenAI's routes in OpenAI's shape too, whoever refused the request."""

    def __init__(
        self, detail: dict[str, Any], status: int, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__({"error": detail}, status, headers)
        self._detail = detail

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer in the words of the route that was asked."""
        if scope["path"].startswith(OPENAI_PATHS):
            detail = openai_detail(self._detail, self.status_code)
            self.body = self.render({"error": detail})
            self.headers["content-length"] = str(len(self.body))
            self.headers.update(_openai_headers(detail))
        await super().__call__(scope, receive, send)


def openai_detail(detail: dict[str, Any], status: int) -> dict[str, Any]:
    """klein's error in OpenAI's shape: `type` and `param` beside klein's own keys."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    unknown_model = (detail["code"], detail["field"]) == (ErrorCode.NOT_FOUND, "model")
    code = "model_not_found" if unknown_model else detail["code"]
    return {**detail, "code": code, "type": kind, "param": detail["field"]}


def _openai_headers(detail: dict[str, Any]) -> dict[str, str]:
    headers = {}
    if not detail["retryable"] or detail["code"] in COSTLY:
        headers["x-should-retry"] = "false"
    if detail["request_id"]:
        headers["x-request-id"] = detail["request_id"]
    return headers


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


class OpenAIErrorDetail(ErrorDetail):
    """klein's error with OpenAI's keys."""

    code: ErrorCode | Literal["model_not_found"]  # type: ignore[assignment]
    type: str
    param: str | None = Field(description="as `field`")


class OpenAIErrorBody(BaseModel):
    """The shape of every error of OpenAI's routes."""

    error: OpenAIErrorDetail


def described(*statuses: int, body: type[BaseModel] = ErrorBody) -> dict[int | str, dict[str, Any]]:
    """The errors that a route answers with, for OpenAPI: `statuses`, and what every route can."""
    codes: dict[int, list[str]] = {}
    for code in ErrorCode:
        codes.setdefault(http_status(code), []).append(f"`{code}`")
    return {
        status: {"model": body, "description": ", ".join(codes[status])}
        for status in sorted({*ON_EVERY_ROUTE, *statuses})
    }


ON_EVERY_ROUTE = (401, 413, 503)
"""Without a key, with headers that are too large, and while klein loads or shuts down."""
DRAWING = (400, 408, 422, 429, 499, 500, 502, 503, 504)
ERRORS = described(*DRAWING)
"""Of the routes that draw."""
OPENAI_ERRORS = described(404, *DRAWING, body=OpenAIErrorBody)
"""Of OpenAI's routes that do."""


def install(app: FastAPI) -> None:
    """Give what routes raise, and what FastAPI refuses by itself, the same shape."""
    # Starlette's types want handlers of any exception, though each hears of its own kind only.
    for kind, handler in (
        (KleinError, _on_klein_error),
        (RequestValidationError, _on_invalid),
        (HTTPException, on_http_exception),
        (Exception, on_bug),
    ):
        app.add_exception_handler(kind, cast("Any", handler))


async def _on_klein_error(request: Request, error: KleinError) -> Response:
    generator = request.app.state.generator
    full = error.code is ErrorCode.QUEUE_FULL and generator is not None
    id = getattr(request.state, "request_id", None)
    return error_response(error, id, generator.retry_after() if full else None)


async def on_bug(_: Request, __: Exception) -> Response:
    """The server that runs the app logs it."""
    return error_response(InternalError("klein failed: see its log"))


async def _on_invalid(_: Request, error: RequestValidationError) -> Response:
    """The field without the part of the request that it is in."""
    errors = [{**row, "loc": row["loc"][1:]} for row in error.errors()]
    if errors[0]["type"] == "json_invalid":
        return error_response(InvalidRequest("the body is not JSON"))
    return error_response(invalid(errors))


async def on_http_exception(_: Request, error: HTTPException) -> Response:
    """What a framework refuses by itself: unknown paths and methods, forms it cannot read."""
    codes = [code for code in ErrorCode if http_status(code) == error.status_code]
    other = ErrorCode.INTERNAL if error.status_code >= 500 else ErrorCode.INVALID_REQUEST
    code = codes[0] if codes else other
    detail = {
        "code": str(code),
        "message": str(error.detail),
        "field": None,
        "retryable": code is ErrorCode.NOT_READY,
        "request_id": None,
    }
    return ErrorResponse(detail, error.status_code, error.headers)
