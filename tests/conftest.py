"""Unit and door tests run where torch cannot be imported: the house must stand without it."""

import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
from hypothesis import HealthCheck, settings

HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate")


class _Blocker(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.split(".")[0] in HEAVY:
            raise ImportError(f"{name} is not importable in these tests")
        return None


_ALLOWED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
settings.register_profile("quick", max_examples=200, deadline=None, suppress_health_check=_ALLOWED)
settings.register_profile("long", settings.get_profile("quick"), max_examples=30_000)
settings.load_profile("quick")


def pytest_configure(config: pytest.Config) -> None:
    os.environ["BENTOML_DO_NOT_TRACK"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    light = ("tests/unit", "tests/doors")
    if all(str(arg).startswith(light) for arg in config.args):
        sys.meta_path.insert(0, _Blocker())
