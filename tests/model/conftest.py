import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from klein.core import GenerationResult, Job
from klein.inference import assemble as assembly
from klein.inference.pipeline import KleinPipeline
from klein.lora.library import LoraLibrary
from klein.models import plan as preflight
from klein.models.machine import Machine
from klein.request.resolve import resolve
from klein.request.schema import parse
from klein.settings import Settings
from tests import tiny

os.environ["HF_HUB_OFFLINE"] = "1"

Draw = Callable[..., GenerationResult]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random-weight pipeline of FLUX.2-klein's architecture."""
    return tiny.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def lora_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loras")


def load(folder: Path | str, loras: Path | None = None, **settings: str) -> KleinPipeline:
    """The real loading path, as every door takes it."""
    chosen = Settings.from_env({"MODEL_ID": str(folder), **settings})
    plan = preflight.plan(chosen, Machine.probe({}))
    return assembly.load(plan, chosen, LoraLibrary(loras, None))


def drawer(pipe: KleinPipeline) -> Draw:
    """A function that draws with `pipe`: two steps at 64×64 unless told otherwise."""

    def draw(job: Job | None = None, **values: Any) -> GenerationResult:
        return pipe.generate(job or make_job(pipe, **values))

    return draw


def make_job(pipe: KleinPipeline, seconds: float = 60, **values: Any) -> Job:
    import time

    defaults = {"prompt": "a portrait", "seed": 1, "num_inference_steps": 2}
    if pipe.info.spec.name != "nano":
        defaults |= {"width": 64, "height": 64, "max_sequence_length": 64}
    resolved = resolve(parse({**defaults, **values}), pipe.info.spec, lambda: 1)
    return Job(resolved.params, time.monotonic() + seconds, resolved.warnings)


@pytest.fixture(scope="session")
def tiny_pipe(tiny_folder: Path, lora_folder: Path) -> KleinPipeline:
    return load(tiny_folder, lora_folder)


@pytest.fixture(scope="session")
def draw(tiny_pipe: KleinPipeline) -> Draw:
    return drawer(tiny_pipe)
