"""Requests made from the OpenAPI document, by its rules and against them, to every route of it.

The long form, in `make attack`: `EXAMPLES=300 python -m pytest tests/attacks/test_openapi.py -s`.
"""

import contextlib
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import Phase, given, settings
from hypothesis.errors import Unsatisfiable
from PIL import Image
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi import checks

from klein.core import GenerationResult, Job
from klein.entrypoints.http.app import standalone
from klein.lora.library import LoraLibrary
from tests.support import fakes, loras

EXAMPLES = int(os.environ.get("EXAMPLES", "6"))
"""Requests to each operation and mode; the few of the short form are always the same."""
KEY = {"x-api-key": "0123456789abcdef"}
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.unsupported_method,
]


class SmallPipeline(fakes.FakePipeline):
    """Its images cost nothing to encode."""

    def generate(self, job: Job) -> GenerationResult:
        drawn = super().generate(job)
        small = Image.new("RGB", (16, 16))
        return replace(drawn, images=tuple(replace(each, image=small) for each in drawn.images))


@pytest.fixture
def app(tmp_path: Path) -> FastAPI:
    """The app, with a key that may do everything, and a LoRA."""
    loras.write(tmp_path / "a.safetensors", *loras.ai_toolkit({"single_blocks.0.linear1": (8, 8)}))
    generator = fakes.generator(
        SmallPipeline(),
        LoraLibrary(tmp_path),
        KLEIN_API_KEYS=f"anna:{KEY['x-api-key']}:uploads",
        KLEIN_LORA_UPLOADS="on",
    )
    return standalone(generator)


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_every_answer_is_as_the_document_says(app: FastAPI, mode: GenerationMode) -> None:
    """No 5xx, no status, type or shape of answer that is not in it."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers=KEY)
    statuses: Counter[int] = Counter()

    def try_operation(operation: Any) -> None:
        @settings(
            max_examples=EXAMPLES,
            database=None,
            phases=[Phase.generate],
            derandomize="EXAMPLES" not in os.environ,
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            answer = case.call_and_validate(headers=KEY, checks=CHECKS)
            statuses[answer.status_code] += 1

        ask()

    for result in schema.get_all_operations():
        with contextlib.suppress(Unsatisfiable):  # what takes no input has no wrong input
            assert isinstance(result, Ok)
            try_operation(result.ok())
    print(mode, sum(statuses.values()), dict(statuses))
    assert {200, 400, 404} <= set(statuses)
