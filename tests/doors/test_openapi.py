"""The OpenAPI description tells the truth about errors."""

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from starlette.testclient import TestClient

from klein.entrypoints.http.app import create_app, standalone
from klein.entrypoints.http.auth import OPEN_PATHS
from tests.support import fakes

KEY = {"x-api-key": "0123456789abcdef"}
BODIES: list[dict[str, Any]] = [
    {},
    {"content": b"{", "headers": KEY | {"content-type": "application/json"}},
    {"json": {"nothing": 1}, "headers": KEY},
    {"json": {"prompt": "x", "width": 10}, "headers": KEY},
    {"json": {"input": {"prompt": "x"}, "webhook": "https://x.example"}, "headers": KEY},
    {"content": b"x" * 70_000_000, "headers": KEY | {"content-type": "application/json"}},
    {
        "params": {"limit": "x", "name": "x"},
        "headers": KEY | {"last-event-id": "x", "prefer": "wait=x"},
    },
    {"headers": KEY | {"x-long": "x" * 40_000}},
]


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in create_app().openapi()["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation["responses"]


def test_every_error_has_kleins_shape() -> None:
    """FastAPI's own 422 is nowhere; 422 is there where a LoRA can fail."""
    schemas = create_app().openapi()["components"]["schemas"]
    assert not {"HTTPValidationError", "ValidationError"} & schemas.keys()
    with_422 = set()
    for method, path, responses in operations():
        for status, response in responses.items():
            if int(status) < 400 or path == "/ping":
                continue
            reference = response["content"]["application/json"]["schema"]["$ref"]
            own = "OpenAIErrorBody" if path.startswith("/v1/") else "ErrorBody"
            assert reference == f"#/components/schemas/{own}", (method, path, status)
            assert response["description"]
            with_422 |= {path} if status == "422" else set()
    drawing = {"/generate", "/generate_json", "/v1/images/generations", "/v1/images/edits"}
    assert with_422 == drawing | {"/loras", "/loras/{name}"}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    key = f"a:{KEY['x-api-key']}:uploads"
    generator = fakes.generator(fakes.FakePipeline(), KLEIN_API_KEYS=key, KLEIN_LORA_UPLOADS="on")
    with TestClient(standalone(generator)) as client:
        yield client
    generator.stop()


def test_what_is_answered_is_described(client: TestClient) -> None:
    """Every route, asked without a key, with bodies of many faults and with too much."""
    for method, path, responses in operations():
        ask = partial(client.request, method, re.sub(r"\{.*?\}", "9", path))
        seen = {ask(**each).status_code for each in BODIES}
        assert {str(status) for status in seen} <= responses.keys(), (method, path, seen)
        assert (401 in seen) is (path not in OPEN_PATHS)
