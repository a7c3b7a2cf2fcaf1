"""Scaled dot-product attention: which backend, and that it really runs here."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from klein.errors import ModelUnavailable
from klein.models.speed import Capability

log = logging.getLogger(__name__)


def _native(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _native(q, k, v)


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    import flash_attn

    attended: Tensor = flash_attn.flash_attn_func(q, k, v)
    return attended


@dataclass(frozen=True, slots=True)
class Backend:
    """One backend. `attend` takes and gives (batch, tokens, heads, dim); `diffusers` is its name
    there, for the tiers that leave the forward to diffusers."""

    label: str
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    diffusers: str


BACKENDS = {
    "cudnn": Backend("cuDNN", _cudnn, "_native_cudnn"),
    "flash": Backend("flash-attn", _flash, "flash"),
    "native": Backend("torch's own attention", _native, "native"),
}


def choose(wanted: str, device: str, capability: Capability, *, fused: bool) -> Backend:
    """The backend for a setting; one that is named and cannot run raises ModelUnavailable.

    `auto` takes cuDNN from Hopper on, flash-attn before it where it is installed, else torch's own.
    Where the forward is left to diffusers (not `fused`) torch's own is the best way to cuDNN.
    """
    if wanted != "auto":
        try:
            prove(BACKENDS[wanted], device)
        except Exception as error:  # whatever a library built for another machine raises
            raise ModelUnavailable(
                f"KLEIN_ATTENTION={wanted} cannot be used here ({type(error).__name__}: "
                f"{str(error)[:200]}); KLEIN_ATTENTION=auto takes what can",
                field="KLEIN_ATTENTION",
            ) from error
        return BACKENDS[wanted]
    for name in _order(capability, fused) if device == "cuda" else ():
        try:
            prove(BACKENDS[name], device)
        except ModuleNotFoundError:
            continue
        except Exception as error:
            log.warning("%s cannot be used here: %s", BACKENDS[name].label, str(error)[:300])
            continue
        return BACKENDS[name]
    return BACKENDS["native"]


def _order(capability: Capability, fused: bool) -> tuple[str, ...]:
    if capability >= (9, 0):
        return ("cudnn",) if fused else ()
    return ("flash",)


def prove(backend: Backend, device: str) -> None:
    """Raise, whatever it is, if the backend does not run on `device` or its answers are wrong."""
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    probe = torch.randn(1, 64, 2, 128, device=device, dtype=kind)
    made = backend.attend(probe, probe, probe).float()
    probe = probe.float().cpu()
    exact = _native(probe, probe, probe)
    error = (made.cpu() - exact).norm() / exact.norm()
    if not error < 2e-2:
        raise RuntimeError(f"its answers are wrong by {error:.0%}")
