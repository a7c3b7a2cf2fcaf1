"""Tests outside the heavy folders run where torch cannot be imported."""

import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, settings

TORCH = ("torch", "diffusers", "transformers", "peft", "accelerate")
HEAVY = ("model", "bundle", "gpu", "page", "monitoring", "ray")
"""The folders whose tests need torch; the Makefile has the same names."""


class _Blocker(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.split(".")[0] in TORCH:
            raise ImportError(f"{name} is not importable in these tests")
        return None


_ALLOWED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
settings.register_profile("quick", max_examples=200, deadline=None, suppress_health_check=_ALLOWED)
settings.register_profile("long", settings.get_profile("quick"), max_examples=30_000)
settings.load_profile("quick")


def _is_heavy(argument: str) -> bool:
    """Whether a path given to pytest is in a heavy folder, or holds one."""
    path = Path(argument.partition("::")[0]).resolve()
    folders = [Path(__file__).parent / name for name in HEAVY]
    return any(path.is_relative_to(folder) or folder.is_relative_to(path) for folder in folders)


def pytest_configure(config: pytest.Config) -> None:
    os.environ["BENTOML_DO_NOT_TRACK"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    if "PYTEST_XDIST_WORKER" in os.environ:  # what a test starts is not measured
        os.environ.pop("COVERAGE_PROCESS_CONFIG", None)
    if not any(_is_heavy(str(arg)) for arg in config.args):
        sys.meta_path.insert(0, _Blocker())
