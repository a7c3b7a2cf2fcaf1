"""What a request may weigh and how long it may take to arrive, checked before anything reads it."""

import asyncio
import contextlib
import json
import time
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from klein.entrypoints.http.errors import error_response
from klein.errors import (
    Cancelled,
    InvalidRequest,
    KleinError,
    QueueFull,
    RequestTooLarge,
    RequestTooSlow,
)
from klein.sources.fetch import MAX_BYTES

MB = 1_000_000
JSON_BYTES = MB
"""Of a body on routes that take no pictures."""
HEADER_BYTES = 32_000
"""Of the address and all headers together."""
JSON_PUNCTUATION = 20_000
"""Brackets and commas of a JSON body at most: a picture in base64 has none."""
LENGTH_DIGITS = 18
"""Of a content-length at most; Python would not read thousands of them."""
BODY_SECONDS = 30.0
"""Without a byte of the body, and besides what its bytes need at BODY_RATE."""
BODY_RATE = 50_000
"""Bytes a second that a body must keep up on average."""
LARGE_BODIES = 8
"""Bodies with pictures that may be arriving at once, by the bytes of as many of the largest."""
JSON = "application/json"
JSON_WITH_PICTURES = frozenset(
    {
        ("POST", "/generate"),
        ("POST", "/generate_json"),
        ("POST", "/jobs"),
        ("POST", "/v1/images/generations"),
    }
)
FORM_WITH_PICTURES = ("POST", "/v1/images/edits")
LINGER_SECONDS = 2.0
"""For the rest of a body whose request is answered already."""
UPLOADS = "/loras"


@dataclass(frozen=True, slots=True)
class _Rule:
    """What a route takes: bytes of a body, whether it must be JSON, and whether it goes to disk."""

    most: int
    json_only: bool = False
    on_disk: bool = False


class _Room:
    """Bytes of large bodies that may be in memory before their requests are parsed."""

    def __init__(self, most: int) -> None:
        self._left = most

    def take(self, size: int) -> None:
        """Raises QueueFull."""
        if size > self._left:
            raise QueueFull("too many large bodies are arriving: try again later")
        self._left -= size

    def give_back(self, size: int) -> None:
        """What `take` took."""
        self._left += size


class LimitRequests:
    """ASGI middleware: refuses bodies that are too large, too slow or no JSON, in klein's shape.

    JSON bodies are read whole, within their bound, and checked to be JSON of bounded structure
    before any framework parses them; other bodies are counted as they stream.
    """

    def __init__(self, app: ASGIApp, picture_bytes: int) -> None:
        self._app = app
        self._picture_bytes = picture_bytes
        self._room = _Room(LARGE_BODIES * picture_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            kind = media_type(Headers(scope=scope))
            rule = self._rule(scope["method"], scope["path"], kind)
            _check_head(scope, rule, kind)
            bounded = _Bounded(receive, rule.most, None if rule.on_disk else self._room)
            if _is_json(kind) and scope["method"] in ("POST", "PUT", "PATCH"):
                replay = _Replay(await _read_json(bounded), receive)
                await self._app(scope, replay, send)
                return
        except KleinError as error:
            await error_response(error)(scope, receive, send)
            return
        await bounded.run(self._app, scope, send)

    def _rule(self, method: str, path: str, kind: str) -> _Rule:
        if path.startswith(UPLOADS) and not _is_json(kind):
            return _Rule(MAX_BYTES, on_disk=True)
        own_job = method == "PUT" and path.startswith("/jobs/")
        if own_job or (method, path) in JSON_WITH_PICTURES:
            return _Rule(self._picture_bytes, json_only=True)
        return _Rule(self._picture_bytes if (method, path) == FORM_WITH_PICTURES else JSON_BYTES)


def media_type(headers: Headers) -> str:
    """Of the body, in lower case; "" where none is named."""
    return headers.get("content-type", "").split(";")[0].strip().lower()


def _is_json(kind: str) -> bool:
    """Whether any framework would parse it as JSON."""
    return kind == JSON or (kind.startswith("application/") and kind.endswith("+json"))


def _check_head(scope: Scope, rule: _Rule, kind: str) -> None:
    """Refuse what is too large or of the wrong kind before a byte of its body is read."""
    size = len(scope["raw_path"]) + len(scope["query_string"])
    size += sum(len(name) + len(value) for name, value in scope["headers"])
    if size > HEADER_BYTES:
        raise RequestTooLarge(
            f"the address and the headers have {size} bytes; {HEADER_BYTES} are the most"
        )
    length = Headers(scope=scope).get("content-length", "").lstrip("0")
    if length.isdecimal() and (len(length) > LENGTH_DIGITS or int(length) > rule.most):
        raise RequestTooLarge(f"the body has more than {rule.most} bytes, the most here")
    if rule.json_only and kind != JSON:
        raise InvalidRequest("content-type: send application/json", field="content-type")


async def _read_json(bounded: "_Bounded") -> bytes:
    """The body; refuses what is not JSON, or has more structure than any request. None at all is
    left to the route, which may want none."""
    body = await bounded.read()
    if not body:
        return body
    punctuation = sum(body.count(sign) for sign in (b"{", b"[", b","))
    if punctuation > JSON_PUNCTUATION:
        raise RequestTooLarge(f"the JSON has {punctuation} parts; {JSON_PUNCTUATION} are the most")
    try:
        await asyncio.to_thread(json.loads, body)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, json.JSONDecodeError) else "it cannot be read"
        raise InvalidRequest(f"the body is not JSON: {reason}") from error
    return body


class _Bounded:
    """A request's body, counted and timed."""

    def __init__(self, receive: Receive, most: int, room: _Room | None) -> None:
        """`room` is where large bodies share what there is."""
        self._receive = receive
        self._most = most
        self._room = room
        self._taken = 0
        self._size = 0
        self._started = time.monotonic()
        self._fault: KleinError | None = None

    async def __call__(self) -> Message:
        """The next message; raises RequestTooLarge, RequestTooSlow or QueueFull."""
        left = self._started + BODY_SECONDS + self._size / BODY_RATE - time.monotonic()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, left))
        except TimeoutError as error:
            raise RequestTooSlow("the body did not arrive in time") from error
        self._size += len(message.get("body", b""))
        if self._size > self._most:
            raise RequestTooLarge(f"the body is over {self._most} bytes, the most here")
        if self._room is not None and self._size - self._taken > JSON_BYTES:
            self._room.take(self._size - self._taken)
            self._taken = self._size
        return message

    async def read(self) -> bytes:
        """The whole body; raises Cancelled when the caller hangs up before its end."""
        parts, more = [], True
        try:
            while more:
                message = await self()
                if message["type"] == "http.disconnect":
                    raise Cancelled("the caller hung up")
                parts.append(message.get("body", b""))
                more = message.get("more_body", False)
            return b"".join(parts)
        finally:
            self._give_back()

    def _give_back(self) -> None:
        if self._room is not None:
            self._room.give_back(self._taken)
            self._taken = 0

    async def run(self, app: ASGIApp, scope: Scope, send: Send) -> None:
        """Run `app` on the body as it streams; the refusal is sent here, whatever `app` says."""
        done = started = False

        async def receive() -> Message:
            nonlocal done
            if done:
                return await self._receive()
            try:
                message = await self()
            except KleinError as error:
                self._fault, done = error, True
                return {"type": "http.disconnect"}
            done = message["type"] != "http.request" or not message.get("more_body", False)
            if done:
                self._give_back()
            return message

        async def guarded(message: Message) -> None:
            nonlocal started
            if self._fault is None or started:
                started = True
                await send(message)

        try:
            await app(scope, receive, guarded)
        except Exception:
            if self._fault is None:
                raise
        finally:
            self._give_back()
        if self._fault is not None and not started:
            await error_response(self._fault)(scope, receive, send)


class ReadToTheEnd:
    """ASGI middleware: an answer that comes before the end of its request's body ends after it.

    A server that closes a connection while bytes are coming resets it, and the caller may never
    see why it was refused.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let it through; what still comes after the answer is dropped for LINGER_SECONDS."""
        done = scope["type"] != "http" or not _has_body(scope)

        async def read() -> Message:
            nonlocal done
            message = await receive()
            done = done or message["type"] != "http.request" or not message.get("more_body", False)
            return message

        async def answer(message: Message) -> None:
            last = message["type"] == "http.response.body" and not message.get("more_body")
            if last and not done:
                await send({**message, "more_body": True})
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LINGER_SECONDS):
                        while not done:
                            await read()
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        await self._app(scope, read, answer)


def _has_body(scope: Scope) -> bool:
    headers = Headers(scope=scope)
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


class _Replay:
    """A body that was read already, then whatever the caller does next."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        """The body once, then the connection's own messages."""
        body, self._body = self._body, None
        if body is None:
            return await self._receive()
        return {"type": "http.request", "body": body, "more_body": False}
