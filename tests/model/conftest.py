import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch

from klein.app.prepare import prepare
from klein.core import GenerationResult, Job, RequestContext
from klein.inference import assemble
from klein.inference.pipeline import KleinPipeline
from klein.lora.library import LoraLibrary
from klein.models.machine import Machine
from klein.models.plan import Plan, plan
from klein.request.resolve import resolve
from klein.request.schema import parse
from klein.settings import Settings
from klein.sources.fetch import Fetcher
from tests.support import tiny

Draw = Callable[..., GenerationResult]

_LIBRARIES: WeakKeyDictionary[KleinPipeline, LoraLibrary] = WeakKeyDictionary()
"""The LoRAs that the jobs of a loaded pipeline may name."""


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random-weight pipeline of FLUX.2-klein's architecture."""
    return tiny.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def lora_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loras")


def planned(folder: Path | str, **settings: str) -> tuple[Plan, Settings]:
    """What the app would load with these settings on this machine."""
    chosen = Settings.from_env({"MODEL_ID": str(folder), **settings})
    return plan(chosen, Machine.probe({})), chosen


def load(
    folder: Path | str,
    loras: Path | None = None,
    dtype: torch.dtype | None = None,
    **settings: str,
) -> KleinPipeline:
    """The real loading path, as every entrypoint takes it."""
    pipe = assemble.load(*planned(folder, **settings), dtype=dtype)
    return with_loras(pipe, loras)


def with_loras(pipe: KleinPipeline, loras: Path | None) -> KleinPipeline:
    """`pipe`, whose jobs may name the LoRAs in `loras`."""
    _LIBRARIES[pipe] = LoraLibrary(loras, None)
    return pipe


def drawer(pipe: KleinPipeline) -> Draw:
    """A function that draws with `pipe`: two steps at 64×64 unless told otherwise."""

    def draw(job: Job | None = None, **values: Any) -> GenerationResult:
        return pipe.generate(job or make_job(pipe, **values))

    return draw


def pictures_of(result: GenerationResult) -> torch.Tensor:
    """Its pictures (N, 3, H, W) in 0..1."""
    stacked = np.stack([np.asarray(one.image) for one in result.images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 255


def make_job(pipe: KleinPipeline, context: RequestContext | None = None, **values: Any) -> Job:
    """A job as the app makes it: resolved, then prepared."""
    defaults = {"prompt": "a portrait", "seed": 1, "num_inference_steps": 2}
    if pipe.info.spec.name != "nano":
        defaults |= {"width": 64, "height": 64, "max_sequence_length": 64}
    resolved = resolve(parse({**defaults, **values}), pipe.info.spec, lambda: 1)
    return prepare(resolved, context or context_of(), _LIBRARIES[pipe], Fetcher())


def context_of(seconds: float = 60, **values: Any) -> RequestContext:
    """A context whose deadline is `seconds` from now."""
    return RequestContext(time.monotonic() + seconds, **values)


@pytest.fixture(scope="session")
def tiny_pipe(tiny_folder: Path, lora_folder: Path) -> KleinPipeline:
    return load(tiny_folder, lora_folder)


@pytest.fixture(scope="session")
def draw(tiny_pipe: KleinPipeline) -> Draw:
    return drawer(tiny_pipe)
