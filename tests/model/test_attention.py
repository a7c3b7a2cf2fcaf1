"""Which attention runs, and what is said about it."""

import sys
from types import ModuleType
from typing import Any

import pytest

from klein import pipeline


class Transformer:
    """Notes the backend it is switched to."""

    backend: str | None = None

    def set_attention_backend(self, name: str) -> None:
        self.backend = name


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A flash-attn that takes any device."""
    module: Any = ModuleType("flash_attn")
    module.__version__ = "2.8.3"
    module.flash_attn_func = lambda q, k, v: q
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return module


def test_without_a_gpu_it_is_torchs() -> None:
    """And there is nothing to say about it."""
    assert pipeline._choose_attention(Transformer(), "cpu") == "torch's own attention"


def test_flash_attn_that_is_not_there_is_said() -> None:
    """A GPU would be faster with it."""
    transformer = Transformer()
    said = pipeline._choose_attention(transformer, "cuda")
    assert said == "torch's own attention (flash-attn is not installed)"
    assert transformer.backend is None


def test_flash_attn_that_fails_is_said(flash_attn: Any) -> None:
    """Here for want of a GPU; elsewhere for another torch. klein still serves."""
    transformer = Transformer()
    said = pipeline._choose_attention(transformer, "cuda")
    assert said.startswith("torch's own attention (flash-attn is installed but failed: ")
    assert transformer.backend is None


def test_flash_attn_that_runs_is_used(flash_attn: Any) -> None:
    """After one call of it."""
    transformer = Transformer()
    assert pipeline._flash_attention(transformer, "cpu") == "flash-attn 2.8.3"
    assert transformer.backend == "flash"
