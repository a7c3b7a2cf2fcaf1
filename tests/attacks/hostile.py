"""Requests that nobody means well with, as bytes, and what came back for them."""

import asyncio
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from klein.request.schema import GenerateRequest

VALID: dict[str, Any] = {
    "prompt": "x", "width": 64, "height": 64, "num_inference_steps": 1,
}  # fmt: skip
JUNK: list[Any] = [
    None, True, "", "5", "\x00", "\ud800", "x" * 100_000, "💥" * 5_000, "../../etc/passwd", -1, 0,
    10**400, 1e308, float("nan"), float("inf"), [], {}, [[]] * 5_000, {"a": {"b": 1}}, [None],
    "https://[::1/x", "https://a..b/x", "https://x:99999/y", "http://169.254.169.254/", "file:///x",
    "data:image/png;base64,AAAA", "a\nb", "a" * 300, [{"path": "x" * 50_000}], [{"path": "a\x00b"}],
    [{"path": "x", "scale": float("nan")}], [{"path": 5}], [{}] * 500,
]  # fmt: skip
KINDS = [
    b"application/json", b"application/json; charset=utf-7", b"text/plain", b"", b"\xff\xfe",
    b"multipart/form-data", b"multipart/form-data; boundary=" + b"x" * 300, b"application/xml",
    b"application/vnd.bentoml+pickle", b"application/x-www-form-urlencoded", b"image/png", b"*/*",
    b"application/octet-stream", b"application/problem+json", b"/", b"a/b/c;;;=", b"text/\xc3\xa9",
]  # fmt: skip
ROUTES = [
    ("POST", "/generate"), ("POST", "/generate_json"), ("POST", "/jobs"), ("PUT", "/jobs/x"),
    ("POST", "/jobs/x/cancel"), ("GET", "/jobs/x/events"), ("POST", "/v1/images/generations"),
    ("POST", "/v1/images/edits"), ("POST", "/loras"), ("DELETE", "/loras/x"), ("GET", "/loras"),
    ("GET", "/v1/models/x"), ("GET", "/capabilities"), ("POST", "/presets"), ("GET", "/docs.json"),
]  # fmt: skip
PATHS = [
    "/loras/%00", "/loras/%ff%fe", "/loras/..%2f..%2fx", "/loras/" + "a" * 5_000, "/jobs/%00",
    "/jobs/" + "a" * 5_000, "/jobs/x/images/99999999999999999999", "/jobs?limit=1e9&before=-1",
    "/v1/models/%F0%9F%92%A5", "//", "/%2e%2e/%2e%2e/etc/passwd", "/" + "x" * 40_000, "/generate/",
    "/nothing?" + "a=b&" * 5_000, "/ui/../service.py", "/ui/%2e%2e%2fpage.py", "/static_content/..",
]  # fmt: skip
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "TRACE"]
ODD_HEADERS = [
    b"last-event-id: 9999999999999", b"last-event-id: \xff", b"prefer: wait=99999999", b"range: x",
    b"prefer: wait=-1", b"authorization: Bearer \xff", b"x-api-key: " + b"k" * 9_000, b"cookie: =;",
    b"accept: application/vnd.bentoml+pickle", b"content-encoding: gzip", b"host: a b",
    b"expect: x",
    b"x-forwarded-for: \x7f", b"traceparent: 00-zz-zz-zz", b"origin: http://[::1", b"upgrade: h2c",
]  # fmt: skip
HONEST = ("not_ready", "deadline_exceeded", "queue_full", "lora_unavailable", "image_unavailable")
"""Codes of refusals that a caller did not cause."""
ERROR_BYTES = 3_000
"""Of an error at most, whatever was sent."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back, and in how many seconds; status 0 is that of a connection that just ended."""

    status: int
    body: bytes
    seconds: float

    def fault(self) -> str | None:
        """What is wrong with it as the answer to a hostile request, None if nothing is."""
        if self.status < 400:
            return None if self.status else "no answer"
        if len(self.body) > ERROR_BYTES:
            return f"an error of {len(self.body)} bytes"
        try:
            error = json.loads(self.body)["error"] if self.body else None
        except ValueError:
            error = self.body.decode(errors="replace")
        code = error.get("code") if isinstance(error, dict) else error
        return f"{self.status} {error}" if self.status >= 500 and code not in HONEST else None


def requests(seed: int) -> Iterator[bytes]:
    """Endless hostile requests; the same for the same seed."""
    rng = random.Random(seed)
    while True:
        yield rng.choice(_MAKERS)(rng)


async def send(host: str, port: int, request: bytes, seconds: float = 60) -> Reply:
    """The reply to `request`; raises TimeoutError when there is none within `seconds`."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    async with asyncio.timeout(seconds):
        reader, writer = await asyncio.open_connection(host, port)
        try:
            writer.write(request)
            data = await reader.read()
        except ConnectionError:
            data = b""
        finally:
            writer.close()
    head, _, body = data.partition(b"\r\n\r\n")
    status = int(head.split(b" ")[1]) if head.startswith(b"HTTP/1.1 ") else 0
    return Reply(status, body, loop.time() - started)


def _request(
    method: str, path: str, body: bytes = b"", kind: bytes = KINDS[0], *headers: bytes
) -> bytes:
    named = [b"content-type: " + kind] if kind else []
    length = [b"content-length: %d" % len(body)] if body or method == "POST" else []
    first = f"{method} {path} HTTP/1.1".encode()
    lines = [first, b"host: x", b"connection: close", *named, *length, *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def _dump(value: Any) -> bytes:
    return json.dumps(value).encode()


def _body(rng: random.Random, path: str) -> dict[str, Any]:
    """A valid body with junk in one of its fields, or with a field that does not exist."""
    field = rng.choice([*GenerateRequest.model_fields, "steps", "x" * 10_000, "size", "model", "n"])
    body = {**VALID, field: rng.choice(JUNK)}
    if path.startswith("/jobs"):
        return {
            "input": body,
            **({rng.choice(["webhook", "y"]): rng.choice(JUNK)} if rng.random() < 0.2 else {}),
        }
    return body


def _wrong_value(rng: random.Random) -> bytes:
    method, path = rng.choice(ROUTES[:7])
    return _request(method, path, _dump(_body(rng, path)))


def _broken_json(rng: random.Random) -> bytes:
    method, path = rng.choice(ROUTES[:9])
    whole = _dump(_body(rng, path))
    body = rng.choice(
        [
            whole[: rng.randrange(len(whole))],
            b"[" * 100_000,
            b'{"a":' * 3_000,
            b"\xef\xbb\xbf" + whole,
            rng.randbytes(500),
            b"null",
            _dump(rng.choice(JUNK)),
            b'{"prompt": "a", "prompt": 5}',
        ]
    )
    return _request(method, path, body)


def _wrong_kind(rng: random.Random) -> bytes:
    method, path = rng.choice(ROUTES)
    return _request(method, path, _dump(VALID), rng.choice(KINDS))


def _broken_form(rng: random.Random) -> bytes:
    method, path = rng.choice(ROUTES[:9])
    part = b'--b\r\ncontent-disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
    name = rng.choice(
        [b"image", b"image[]", b"mask", b"prompt", b"n", b"file", b"x" * 500, b"\xff"]
    )
    file = rng.choice(
        [b"", b'; filename="a.png"', b'; filename="../\x00"', b"; filename*=utf-8''%zz"]
    )
    value = rng.choice(
        [b"", b"x" * 100_000, rng.randbytes(1_000), b"\x89PNG\r\n\x1a\n" + b"\0" * 50]
    )
    parts = part % (name, file, value) * rng.choice([1, 2, 200])
    end = rng.choice([b"--b--\r\n", b"", b"--b"])
    return _request(method, path, parts + end, b"multipart/form-data; boundary=b")


def _odd_path(rng: random.Random) -> bytes:
    return _request(rng.choice(METHODS), rng.choice(PATHS))


def _odd_method(rng: random.Random) -> bytes:
    return _request(rng.choice([*METHODS, "FOO", "get"]), rng.choice(ROUTES)[1], b"{}")


def _odd_header(rng: random.Random) -> bytes:
    method, path = rng.choice(ROUTES)
    return _request(method, path, _dump(VALID), KINDS[0], *rng.sample(ODD_HEADERS, 2))


def _wrong_length(rng: random.Random) -> bytes:
    method, path = rng.choice(ROUTES)
    length = rng.choice([b"-1", b"9" * 30, b"1e3", b"400000000", b"+5", b"0x10"])
    return _request(method, path, b"", KINDS[0], b"content-length: " + length)


def _no_http(rng: random.Random) -> bytes:
    return (
        rng.choice([rng.randbytes(300), b"GET\r\n\r\n", b"\x16\x03\x01" + rng.randbytes(200)])
        + b"\r\n\r\n"
    )


_MAKERS: list[Callable[[random.Random], bytes]] = [
    _wrong_value, _wrong_value, _broken_json, _wrong_kind, _broken_form, _odd_path, _odd_method,
    _odd_header, _wrong_length, _no_http,
]  # fmt: skip
