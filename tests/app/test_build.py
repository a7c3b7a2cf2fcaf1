"""A generator as settings make it, with a fake model."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from klein.app import build
from klein.app.generator import Generator
from klein.errors import KleinError
from klein.settings import Settings
from tests.support import fakes, loras


@contextmanager
def started(tmp_path: Path, failures: list[KleinError], **settings: str) -> Iterator[Generator]:
    values = {"MODEL_ID": "nano", "KLEIN_LORA_CACHE": str(tmp_path / "cache"), **settings}
    made = build.generator(
        Settings.from_env(values), fakes.FakePipeline, on_load_failed=failures.append
    )
    try:
        yield made
    finally:
        made.stop()


def test_base_loras_are_in_every_result(tmp_path: Path) -> None:
    """Before those that a request names, at the operator's scale."""
    with started(tmp_path, [], KLEIN_BASE_LORAS="zibbo.safetensors:0.5") as generator:
        generator.engine.wait_ready(30)
        request = fakes.request(loras=[{"path": "pixelkin.safetensors"}])
        result = asyncio.run(generator.run(request, generator.context())).result
        assert [(x.path, x.scale) for x in result.params.loras] == [
            ("zibbo.safetensors", 0.5),
            ("pixelkin.safetensors", 1.0),
        ]
        plain = asyncio.run(generator.run(fakes.request(), generator.context())).result
        assert [report.path for report in plain.loras] == ["zibbo.safetensors"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gone.safetensors", "KLEIN_BASE_LORAS: LoRA 'gone.safetensors' is not in the LoRA folder"),
        ("wide.safetensors", r"is for another model \(width 8\), not for nano"),
    ],
)
def test_a_base_lora_that_cannot_act_stops_the_start(tmp_path: Path, name: str, says: str) -> None:
    """Not the first request."""
    tensors, metadata = loras.ai_toolkit({"single_blocks.0.linear1": (72, 8)}, 4)
    loras.write(tmp_path / "wide.safetensors", tensors, metadata)
    failures: list[KleinError] = []
    folder = {"KLEIN_LORA_DIR": str(tmp_path), "KLEIN_BASE_LORAS": name}
    with started(tmp_path, failures, **folder) as generator:
        with pytest.raises(KleinError):
            generator.engine.wait_ready(30)
        (failure,) = failures
    assert failure.field == "KLEIN_BASE_LORAS"
    with pytest.raises(KleinError, match=says):
        raise failure
