"""Proof, before the first picture, that klein's kernels compute what diffusers does on this GPU."""

import logging
from pathlib import Path

import torch
from diffusers import Flux2Transformer2DModel

from klein.errors import ModelUnavailable
from klein.inference.acceleration.attention import Backend
from klein.inference.acceleration.transformer import FusedForward
from klein.models.plan import Plan
from klein.models.speed import Acceleration, eager
from klein.settings import Settings

log = logging.getLogger(__name__)


def proved(plan: Plan, settings: Settings, backend: Backend) -> Acceleration:
    """The acceleration, after klein's forward equalled diffusers' on this GPU.

    The model is one double and one single block of this width with random weights, so the kernels
    that are compiled for it are those of the pictures to come. Where they are wrong or do not
    compile, a tier of klein's own choice becomes eager; one that is named raises ModelUnavailable.
    """
    chosen = plan.acceleration
    if not plan.on_gpu or not chosen.has("fused"):
        return chosen
    try:
        from klein.inference.acceleration import kernels

        kernels.keep_in(settings.kernel_cache.expanduser())
        error = difference(plan, backend)
        if not error < 0.1:
            raise RuntimeError(f"the forward is wrong by {error:.0%}")
    except Exception as error:
        why = f"klein's kernels cannot be used here ({type(error).__name__}: {str(error)[:300]})"
        if settings.speed != "auto":
            raise ModelUnavailable(
                f"KLEIN_SPEED={settings.speed}: {why}; KLEIN_SPEED=eager needs none",
                field="KLEIN_SPEED",
            ) from error
        log.warning("%s: pictures take longer", why)
        return eager(why)
    return chosen


@torch.inference_mode()
def difference(plan: Plan, backend: Backend) -> float:
    """|klein's velocity - diffusers'| / |diffusers'| (bfloat16 alone makes about 0.02)."""
    config = dict(Flux2Transformer2DModel.load_config(Path(plan.source) / "transformer"))
    config |= {"num_layers": 1, "num_single_layers": 1}
    with torch.device("meta"):
        model = Flux2Transformer2DModel.from_config(config).eval()
    with torch.device(plan.device):
        _fill(model)
        ids = [torch.zeros(1, count, 4) for count in (48, 40)]
        for each in ids:
            each[..., 1:3] = torch.randint(0, 64, each[..., 1:3].shape)
        given = {
            "hidden_states": torch.randn(1, 48, model.config.in_channels, dtype=torch.bfloat16),
            "encoder_hidden_states": torch.randn(
                1, 40, model.config.joint_attention_dim, dtype=torch.bfloat16
            ),
            "timestep": torch.full((1,), 0.5, dtype=torch.bfloat16),
            "img_ids": ids[0],
            "txt_ids": ids[1],
        }
    stock = model(**given, return_dict=False)[0].float()
    klein = FusedForward(model, backend.attend)(**given)[0].float()
    return float((klein - stock).norm() / stock.norm())


def _fill(model: torch.nn.Module) -> None:
    """Random bfloat16 weights, made as such: the model's own are being read meanwhile, and a card
    that just holds them has no room for float32."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            values = torch.randn(parameter.shape, dtype=torch.bfloat16)
            values *= parameter.shape[-1] ** -0.5
            setattr(module, name, torch.nn.Parameter(values + (parameter.ndim == 1)))
