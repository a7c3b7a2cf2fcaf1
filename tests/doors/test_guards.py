"""Keys and limits, on the app alone and on the whole service."""

import asyncio
import base64
import json
import re
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from klein.entrypoints.http import limits
from klein.entrypoints.http.app import middlewares, standalone
from klein.entrypoints.http.auth import OPEN_PATHS
from klein.entrypoints.http.draining import Door
from klein.errors import BadSetting
from klein.lora.library import LoraLibrary
from klein.request import images
from klein.settings import Settings
from tests.support import fakes

KEYS = "anna:0123456789abcdef,ops:fedcba9876543210:uploads"
NO_KEY: list[dict[str, Any]] = [
    {},
    {"authorization": "Bearer 0123456789abcdefx"},
    {"authorization": "Basic x"},
    {"x-api-key": b"\xe9"},
]
ANNA, OPS = "0123456789abcdef", "fedcba9876543210"


def client(**settings: Any) -> TestClient:
    return TestClient(standalone(fakes.generator(fakes.FakePipeline(), **settings)))


def code(answer: Any) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


@pytest.fixture(scope="module")
def keyed() -> Iterator[TestClient]:
    with client(KLEIN_API_KEYS=KEYS) as made:
        yield made


@pytest.fixture(scope="module")
def unkeyed() -> Iterator[TestClient]:
    with client() as made:
        yield made


def test_every_route_wants_a_key(keyed: TestClient) -> None:
    """But those of probes: without one 401, with a wrong one 401, with a right one not."""
    paths = keyed.app.openapi()["paths"]  # type: ignore[attr-defined]
    assert len(paths) > 5
    for path, methods in paths.items():
        for method in methods:
            ask = partial(keyed.request, method, re.sub(r"\{.*?\}", "x", path))
            for headers in NO_KEY:
                answer = ask(headers=headers)
                assert (answer.status_code == 401) is (path not in OPEN_PATHS)
                assert (answer.headers.get("www-authenticate") == "Bearer") is (
                    path not in OPEN_PATHS
                )
            for headers in ({"authorization": f"bearer {OPS}"}, {"x-api-key": OPS}):
                assert ask(headers=headers).status_code != 401


def test_the_description_says_where_a_key_is_needed(keyed: TestClient) -> None:
    """On every route but those that answer without."""
    for path, methods in keyed.app.openapi()["paths"].items():  # type: ignore[attr-defined]
        for operation in methods.values():
            assert (operation["security"] == [{}]) is (path in OPEN_PATHS), path


def test_uploads_need_a_key_with_that_right(keyed: TestClient) -> None:
    """403 for another; allowed keys go on to the next question."""
    answer = keyed.delete("/loras/x.safetensors", headers={"x-api-key": ANNA})
    assert code(answer) == (403, "forbidden")
    answer = keyed.delete("/loras/x.safetensors", headers={"x-api-key": OPS})
    assert "KLEIN_LORA_UPLOADS" in answer.json()["error"]["message"]
    assert keyed.get("/loras", headers={"x-api-key": ANNA}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://[::1"},
        {"sec-fetch-site": "cross-site"},
    ],
)
def test_pages_of_other_origins_change_nothing(
    unkeyed: TestClient, headers: dict[str, str]
) -> None:
    """A visitor's browser is inside the operator's network; the page it shows is not."""
    sent = {"content-type": "text/plain", **headers}
    answer = unkeyed.post("/loras?name=a.safetensors", content=b"x", headers=sent)
    assert code(answer) == (403, "forbidden")
    answer = unkeyed.delete("/loras/x", headers={"origin": "http://testserver"})
    assert "KLEIN_LORA_UPLOADS" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"KLEIN_API_KEYS": "short"}, "NAME:KEY"),
        ({"KLEIN_API_KEYS": "a:tooshort"}, "16 characters"),
        ({"KLEIN_API_KEYS": f"a:{OPS},{ANNA}"}, "entry 2: write NAME:KEY"),
        ({"KLEIN_API_KEYS": f"a:{ANNA},a:{OPS}"}, "same name"),
        ({"KLEIN_API_KEYS": f"a:{ANNA},b:{ANNA}:uploads"}, "same key"),
        ({"KLEIN_API_KEYS": f"a:clé{ANNA}"}, "ASCII"),
        ({"KLEIN_API_KEYS": f"a:{ANNA} {OPS}"}, "ASCII"),
        ({"KLEIN_API_KEYS": f"a:{ANNA}:admin"}, "uploads"),
        ({"KLEIN_API_KEYS": " , "}, "no key"),
        ({"KLEIN_API_KEYS_FILE": "/no/such/file"}, "cannot be read"),
        ({"KLEIN_CORS_ORIGINS": "*, https://app.example"}, "every origin"),
    ],
)
def test_settings_that_cannot_be_meant_stop_the_start(settings: dict[str, str], says: str) -> None:
    """Never an open server by a slip of the pen, and never a key in the message."""
    with pytest.raises(BadSetting, match=says) as caught:
        middlewares(Settings.from_env(settings), Door())
    assert ANNA not in str(caught.value)


def test_keys_from_a_file(tmp_path: Path) -> None:
    """One a line, with comments."""
    file = tmp_path / "keys"
    file.write_text(f"# ours\n\nanna:{ANNA}\nops:{OPS}:uploads\n")
    with client(KLEIN_API_KEYS_FILE=str(file)) as made:
        assert made.get("/presets").status_code == 401
        assert made.get("/presets", headers={"x-api-key": ANNA}).status_code == 200


def test_other_origins_may_be_let_in() -> None:
    """CORS is closed unless set; a preflight needs no key."""
    origin = {"origin": "https://app.example", "access-control-request-method": "POST"}
    with client(KLEIN_CORS_ORIGINS="https://app.example", KLEIN_API_KEYS=KEYS) as made:
        answer = made.options("/presets", headers=origin)
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        refused = made.get("/presets", headers=origin)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://app.example"
        assert refused.headers["access-control-expose-headers"] == "*"
    with client() as made:
        assert "access-control-allow-origin" not in made.get("/presets", headers=origin).headers


def test_a_body_holds_all_pictures_that_a_request_may_have(unkeyed: TestClient) -> None:
    """In base64, which is a third longer; their own limit refuses more of them, by its name."""
    share = images.MAX_TOTAL_BYTES // 3
    texts = [base64.b64encode(bytes(share)).decode()] * 3
    answer = unkeyed.post("/generate", json={"prompt": "x" * 5000, "images": texts})
    assert (answer.status_code, answer.json()["error"]["field"]) == (400, "images.0")
    pictures = sum(map(len, texts))
    assert limits.JSON_BYTES <= Settings().max_body_mb * limits.MB - pictures < 3 * limits.MB


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"{" * 500_000, 413, "parts"),
        (b"[" * 15_000, 400, "not JSON"),
        (b"{", 400, "not JSON"),
        (b"\xff\xfe", 400, "not JSON"),
        (b'"' + b"x" * 1_100_000 + b'"', 413, "1000000"),
    ],
)
def test_json_is_checked_before_it_is_parsed(
    unkeyed: TestClient, body: bytes, status: int, says: str
) -> None:
    """Its size, its structure, and that it is JSON at all."""
    headers = {"content-type": "application/json"}
    answer = unkeyed.post("/v1/models", content=body, headers=headers)
    assert answer.status_code == status
    assert says in answer.json()["error"]["message"]


def test_every_kind_of_json_is_checked(unkeyed: TestClient) -> None:
    """Whatever FastAPI would parse; a job is made of application/json only."""
    kind = {"content-type": "application/problem+json; charset=utf-8"}
    body = b"[" + b"[]," * 20_000 + b"[]]"
    assert unkeyed.post("/v1/models", content=body, headers=kind).status_code == 413
    answer = unkeyed.put("/jobs/x", content=b"{}", headers=kind)
    assert (answer.status_code, answer.json()["error"]["field"]) == (400, "content-type")


def test_no_body_is_no_broken_body(unkeyed: TestClient) -> None:
    """Some clients say JSON and send none; what needs one misses it."""
    kind = {"content-type": "application/json"}
    assert unkeyed.post("/jobs/x/cancel", headers=kind).status_code == 404
    for path in ("/jobs", "/generate", "/v1/images/generations"):
        assert unkeyed.post(path, headers=kind).status_code == 400


def test_the_case_of_a_media_type_does_not_matter(unkeyed: TestClient) -> None:
    """RFC 9110."""
    kind = {"content-type": "Multipart/Form-Data; boundary=b"}
    answer = unkeyed.post("/v1/images/edits", content=b"--b--\r\n", headers=kind)
    assert (answer.status_code, answer.json()["error"]["field"]) == (400, "image")


def test_a_slash_too_many_is_not_found(unkeyed: TestClient) -> None:
    """A redirect would lead from https to http behind a proxy, and show the key there."""
    for path in ("/presets/", "/jobs/", "/generate/"):
        assert unkeyed.get(path, follow_redirects=False).status_code == 404


@pytest.mark.parametrize(
    "path", ["/generate", "/generate_json", "/jobs", "/v1/images/generations", "/loras", "/presets"]
)
def test_forms_are_refused_before_they_are_read(path: str) -> None:
    """Where no form is wanted, and where uploads are off."""
    app = standalone(fakes.generator(fakes.FakePipeline()))
    answer = drive(app, path, [b"x" * 1_000] * 50, kind=b"multipart/form-data; boundary=b")
    assert (answer["status"] in (400, 405), answer["read"]) == (True, 0)


def test_json_for_uploads_is_small(tmp_path: Path) -> None:
    """It names a LoRA; only the file itself may be large."""
    answer = drive(uploading(tmp_path), "/loras", [b" " * 500_000] * 50, kind=b"application/json")
    assert (answer["status"], answer["read"]) == (413, 3)


def test_headers_are_bounded(unkeyed: TestClient) -> None:
    """Their sum, not only each."""
    headers = {f"x-{n}": "y" * 1000 for n in range(40)}
    assert code(unkeyed.get("/presets", headers=headers)) == (413, "request_too_large")


@pytest.mark.parametrize("length", ["2000000", "9" * 6000])
def test_a_length_that_is_too_much_is_refused(unkeyed: TestClient, length: str) -> None:
    """However many digits it has."""
    answer = unkeyed.get("/presets", headers={"content-length": length})
    assert code(answer) == (413, "request_too_large")


def uploading(folder: Path) -> Any:
    """The app of a server whose LoRAs callers may change."""
    settings = {"KLEIN_LORA_DIR": str(folder), "KLEIN_LORA_UPLOADS": "on"}
    return standalone(fakes.generator(fakes.FakePipeline(), LoraLibrary(folder), **settings))


def drive(
    app: Any, path: str, parts: list[bytes], *, pause: float = 0.0, kind: bytes = b"x/y"
) -> dict[str, Any]:
    """Send `parts` of a body to `app`, `pause` seconds apart; what came back."""
    sent: dict[str, Any] = {"read": 0}

    async def receive() -> Message:
        await anyio.sleep(pause)
        if sent["read"] == len(parts):
            await anyio.sleep(60)
        sent["read"] += 1
        more = sent["read"] < len(parts)
        return {"type": "http.request", "body": parts[sent["read"] - 1], "more_body": more}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            sent["status"] = message["status"]
        else:
            sent["body"] = sent.get("body", b"") + message.get("body", b"")

    headers = [(b"content-type", kind), (b"host", b"x")]
    scope = {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(),
        "query_string": b"name=a.safetensors", "headers": headers, "http_version": "1.1",
        "scheme": "http", "root_path": "", "client": ("t", 1), "server": ("t", 80),
    }  # fmt: skip
    anyio.run(app, scope, receive, send)
    return sent


def test_a_body_without_a_length_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest is not read, whatever the route does with it."""
    monkeypatch.setattr(limits, "MAX_BYTES", 2_500_000)
    answer = drive(uploading(tmp_path), "/loras", [b"x" * 1_000_000] * 50)
    assert (answer["status"], json.loads(answer["body"])["error"]["code"]) == (
        413,
        "request_too_large",
    )
    assert answer["read"] == 3


def scope_of(kind: bytes) -> Scope:
    headers = [(b"content-type", kind)]
    return {
        "type": "http", "method": "POST", "path": "/generate_json", "raw_path": b"/generate_json",
        "query_string": b"", "headers": headers,
    }  # fmt: skip


def test_large_bodies_share_what_memory_there_is() -> None:
    """One too many is told to come later; a small one always has room, as has the next."""
    read: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        read.append(len((await receive())["body"]))

    limited = limits.LimitRequests(app, 2 * limits.MB)

    async def ask(size: int, seconds: float) -> int:
        """The status of a refusal, 0 if there was none; the last byte comes after `seconds`."""
        sent, parts = [0], [b'"' + b"x" * (size - 2), b'"']

        async def receive() -> Message:
            if len(parts) == 1:
                await anyio.sleep(seconds)
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

        async def send(message: Message) -> None:
            sent.append(message.get("status", 0))

        await limited(scope_of(b"application/json"), receive, send)
        return max(sent)

    async def scenario() -> list[int]:
        large = [ask(2 * limits.MB, 0.2) for _ in range(limits.LARGE_BODIES + 1)]
        return await asyncio.gather(*large, ask(1000, 0.1))

    for _ in range(2):
        assert sorted(asyncio.run(scenario())) == [0] * (limits.LARGE_BODIES + 1) + [429]
    assert sorted(read) == [1000] * 2 + [2 * limits.MB] * 2 * limits.LARGE_BODIES


def test_half_a_body_is_nobodys() -> None:
    """Of a caller who hung up: it is neither parsed nor passed on."""
    messages: list[Message] = [
        {"type": "http.request", "body": b'{"prompt"', "more_body": True},
        {"type": "http.disconnect"},
    ]
    asked: list[Scope] = []
    statuses: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        asked.append(scope)

    async def receive() -> Message:
        return messages.pop(0)

    async def send(message: Message) -> None:
        statuses.append(message.get("status", 0))

    anyio.run(limits.LimitRequests(app, limits.MB), scope_of(b"application/json"), receive, send)
    assert (asked, statuses[0]) == ([], 499)


@pytest.mark.parametrize("kind", [b"application/json", b"x/y"])
def test_a_body_that_drips_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: bytes
) -> None:
    """However steadily it drips, the whole has an end."""
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.3)
    app = uploading(tmp_path)
    started = time.monotonic()
    answer = drive(app, "/loras", [b" "] * 1000, pause=0.05, kind=kind)
    assert (answer["status"], time.monotonic() - started < 2) == (408, True)


@pytest.mark.parametrize(("more", "most"), [({}, 2), ({"KLEIN_JOBS_PER_KEY": "1"}, 1)])
def test_one_key_cannot_hold_all_places(more: dict[str, str], most: int) -> None:
    """Half of the queue at most unless a setting says so; another key may draw beside it."""
    pipe = fakes.FakePipeline()
    pipe.gate.clear()
    made = fakes.generator(pipe, KLEIN_API_KEYS=KEYS, KLEIN_QUEUE_SIZE="4", **more)
    with TestClient(standalone(made)) as client:

        def post(key: str) -> Any:
            body = {"input": {"prompt": "x"}}
            return client.post("/jobs", json=body, headers={"x-api-key": key})

        mine = [post(ANNA) for _ in range(most + 1)]
        assert [answer.status_code for answer in mine] == [202] * most + [429]
        error = mine[-1].json()["error"]
        assert error["code"] == "queue_full"
        assert "'anna'" in error["message"]
        assert "KLEIN_JOBS_PER_KEY" in error["message"]
        assert post(OPS).status_code == 202
        pipe.gate.set()
        for answer in mine[:most]:
            url = f"/jobs/{answer.json()['id']}"
            headers = {"x-api-key": ANNA}
            while client.get(url, headers=headers).json()["status"] not in ("succeeded", "failed"):
                time.sleep(0.01)
        assert post(ANNA).status_code == 202
