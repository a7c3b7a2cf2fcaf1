"""Which attention runs, and that what is named and cannot run is refused."""

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest

from klein.errors import ModelUnavailable
from klein.inference.acceleration import attention
from klein.inference.acceleration.check import difference
from tests.model.conftest import planned


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A flash-attn that takes any device."""
    module: Any = ModuleType("flash_attn")
    module.flash_attn_func = attention.BACKENDS["native"].attend
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return module


def test_without_a_gpu_it_is_torchs() -> None:
    """Whatever else is installed."""
    assert attention.choose("auto", "cpu", (0, 0), fused=True).label == "torch's own attention"


def test_before_hopper_flash_attn_is_taken_if_it_runs(
    flash_attn: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried before it is believed; where it fails or lies klein still serves."""
    tried: list[attention.Backend] = []
    real = attention.prove

    def prove(one: attention.Backend, _: str) -> None:
        tried.append(one)
        real(one, "cpu")

    monkeypatch.setattr(attention, "prove", prove)
    assert attention.choose("auto", "cuda", (8, 6), fused=True).label == "flash-attn"
    flash_attn.flash_attn_func = lambda q, k, v: q * 0
    assert attention.choose("auto", "cuda", (8, 6), fused=True).label == "torch's own attention"
    monkeypatch.delitem(sys.modules, "flash_attn")
    assert attention.choose("auto", "cuda", (8, 6), fused=True).label == "torch's own attention"
    assert len(tried) == 3


def test_hopper_takes_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured the fastest there; flash-attn is not even tried."""
    monkeypatch.setattr(attention, "prove", lambda *_: None)
    assert attention.choose("auto", "cuda", (9, 0), fused=True).label == "cuDNN"
    assert attention.choose("auto", "cuda", (9, 0), fused=False).label == "torch's own attention"


@pytest.mark.parametrize("name", ["flash", "cudnn"])
def test_one_that_is_named_and_cannot_run_stops_the_start(name: str) -> None:
    """With the setting and the way out."""
    with pytest.raises(ModelUnavailable, match=f"KLEIN_ATTENTION={name} .*KLEIN_ATTENTION=auto"):
        attention.choose(name, "cpu", (0, 0), fused=True)


def test_the_proof_tells_right_from_wrong() -> None:
    """klein's forward equals diffusers' on random weights; with attention that is none it does
    not."""
    plan, _ = planned("nano", KLEIN_SPEED="exact")
    native = attention.BACKENDS["native"]
    assert difference(plan, native) < 0.02
    assert difference(plan, replace(native, attend=lambda q, k, v: v)) > 0.1
