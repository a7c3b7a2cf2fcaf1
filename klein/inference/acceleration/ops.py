"""What lies between a block's matrix products, and the products themselves, in bfloat16 or float8.

Each function is plain torch where there is no GPU, and one Triton kernel (`kernels`) where there is
one. They follow Flux2Transformer2DModel of diffusers and round once where it rounds
several times: nothing but the order of floating-point operations differs.

Rows that go into a float8 product are quantised row by row to float8_e4m3fn by the function that
makes them; the weights are quantised output by output. Both have float32 scales.
"""

from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


class Rows(NamedTuple):
    """Quantised rows: `values` (rows, width) float8, `scale` (rows, 1) float32; they stand for a
    (batch, tokens, width) tensor."""

    values: Tensor
    scale: Tensor
    batch: int


def _kernels(x: Tensor) -> ModuleType | None:
    if not x.is_cuda:
        return None
    from klein.inference.acceleration import kernels

    return kernels


def _rows(made: tuple[Tensor, Tensor], batch: int, quantised: bool) -> Tensor | Rows:
    out, scale = made
    return Rows(out, scale, batch) if quantised else out.view(batch, -1, out.shape[-1])


def _as_rows(x: Tensor, kind: torch.dtype, quantised: bool) -> Tensor | Rows:
    """(batch, tokens, width) float32 in the form that a product wants; the plain torch way."""
    return _quantised(x, 0, x.shape[1]) if quantised else x.to(kind)


def norm_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    quantised: bool,
    added: tuple[Tensor, Tensor] | None = None,
) -> Tensor | Rows:
    """(1 + scale) · LayerNorm(x) + shift of a contiguous `x` (batch, tokens, width).

    With `added`, a (gate, value) pair, gate · value is added to `x` in place first.
    """
    gate, value = added or (None, None)
    if kernels := _kernels(x):
        made = kernels.norm_modulate(x, shift, scale, eps, quantised, value, gate)
        return _rows(made, x.shape[0], quantised)
    if gate is not None and value is not None:
        x += gate * value
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    moved = normed * (1 + scale.float()) + shift.float()
    return _as_rows(moved, x.dtype, quantised)


def join_heads(
    qkv: tuple[Tensor, Tensor, Tensor],
    weights: tuple[Tensor, Tensor],
    rope: tuple[Tensor, Tensor],
    joint: tuple[Tensor, Tensor, Tensor],
    offset: int,
    eps: float,
) -> None:
    """RMS-norm and rotate q's and k's heads; put q, k and v into `joint` from token `offset` on.

    `qkv` are contiguous (batch, tokens, heads · dim) of one stream, `joint` contiguous
    (batch, all tokens, heads, dim), `weights` those of the two norms (dim), `rope` cosines and
    sines (all tokens, dim) float32 as diffusers' Flux2PosEmbed makes them.
    """
    heads, dim = joint[0].shape[2:]
    stop = offset + qkv[0].shape[1]
    if kernels := _kernels(qkv[0]):
        kernels.join_heads(*qkv, weights, rope, joint, offset, eps, (0, 0))
        return
    for source, weight, target in zip(qkv[:2], weights, joint[:2], strict=True):
        target[:, offset:stop] = _turned(source, heads, dim, weight, rope, slice(offset, stop), eps)
    joint[2][:, offset:stop] = _heads(qkv[2], heads)


def split_heads(
    hidden: Tensor,
    heads: int,
    weights: tuple[Tensor, Tensor],
    rope: tuple[Tensor, Tensor],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k, normed and rotated, and v, all (batch, tokens, heads, dim), v a view.

    They are the first columns of a contiguous `hidden` (batch, tokens, 3 · heads · dim + more).
    """
    batch, tokens, _ = hidden.shape
    dim = weights[0].shape[0]
    width = heads * dim
    v = _heads(hidden[..., 2 * width : 3 * width], heads)
    if kernels := _kernels(hidden):
        q, k = hidden.new_empty(2, batch, tokens, heads, dim)
        columns = width, 2 * width
        kernels.join_heads(hidden, hidden, hidden, weights, rope, (q, k, None), 0, eps, columns)
        return q, k, v
    every = slice(0, tokens)
    q, k = (
        _turned(hidden[..., i * width : (i + 1) * width], heads, dim, weights[i], rope, every, eps)
        for i in (0, 1)
    )
    return q, k, v


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.view(*x.shape[:-1], heads, -1)


def _turned(
    x: Tensor,
    heads: int,
    dim: int,
    weight: Tensor,
    rope: tuple[Tensor, Tensor],
    at: slice,
    eps: float,
) -> Tensor:
    cosine, sine = (table[at, None, :] for table in rope)
    normed = F.rms_norm(_heads(x, heads).float(), (dim,), weight.float(), eps)
    real, imaginary = normed.view(*normed.shape[:-1], dim // 2, 2).unbind(-1)
    turned = torch.stack([-imaginary, real], -1).flatten(-2)
    return (normed * cosine + turned * sine).to(x.dtype)


def swiglu(
    hidden: Tensor,
    gate_at: int,
    quantised: bool,
    attended: Tensor | None = None,
    keep: tuple[int, int] | None = None,
) -> Tensor | Rows:
    """silu(gate) · up, where gate and up are the columns from `gate_at` on.

    `hidden` is a contiguous (batch, tokens, width); `attended` (batch, tokens, n), if there is one,
    goes before the result. Only tokens `keep[0]` to `keep[1]` are made, all without it.
    """
    start, stop = keep or (0, hidden.shape[1])
    if kernels := _kernels(hidden):
        made = kernels.swiglu(hidden, gate_at, attended, start, stop, quantised)
        return _rows(made, len(hidden), quantised)
    gate, up = hidden[:, start:stop, gate_at:].float().chunk(2, -1)
    out = F.silu(gate) * up
    if attended is not None:
        out = torch.cat([attended[:, start:stop].float(), out], -1)
    return _as_rows(out, hidden.dtype, quantised)


def rows(x: Tensor, start: int, stop: int, quantised: bool) -> Tensor | Rows:
    """Tokens `start` to `stop` of a contiguous `x` (batch, tokens, width), ready for a product."""
    return _quantised(x, start, stop) if quantised else x[:, start:stop]


def _quantised(x: Tensor, start: int, stop: int) -> Rows:
    if kernels := _kernels(x):
        values, scale = kernels.quantise(x, start, stop)
        return Rows(values, scale, len(x))
    return Rows(*round_rows(x[:, start:stop].flatten(0, 1)), len(x))


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, width) in float8 and their scales (n, 1) float32: the same bits on every device."""
    full = x.float()
    scale = full.abs().amax(1, keepdim=True).clamp_min(1e-12) / FP8_MAX
    return (full / scale).to(FP8), scale


def linear(layer: torch.nn.Linear, x: Tensor | Rows) -> Tensor:
    """The layer's product, (batch, tokens, out) in the weight's type; of rows in float8."""
    if isinstance(x, Tensor):
        if x.is_contiguous():
            return F.linear(x, layer.weight)
        return torch.bmm(x, layer.weight.t().expand(len(x), -1, -1))
    weight, scale = float8_copy(layer)
    if x.values.is_cuda:
        out = torch._scaled_mm(
            x.values,
            weight.t(),
            scale_a=x.scale,
            scale_b=scale,
            out_dtype=layer.weight.dtype,
            use_fast_accum=True,
        )
    else:
        out = ((x.values.float() @ weight.float().t()) * x.scale * scale).to(layer.weight.dtype)
    return out.view(x.batch, -1, out.shape[-1])


def is_quantised(layer: torch.nn.Module) -> bool:
    """Whether the layer acts through a float8 copy of its weight."""
    return hasattr(layer, "float8")


def acts_on(layer: torch.nn.Linear) -> torch.device:
    """Where the layer's products are made."""
    return float8_copy(layer)[0].device if is_quantised(layer) else layer.weight.device


def float8_copy(layer: torch.nn.Linear) -> tuple[Tensor, Tensor]:
    """The float8 copy (out, in) and its scales (1, out)."""
    return layer.get_buffer("float8"), layer.get_buffer("float8_scale")


def use_float8_weight(layer: torch.nn.Linear, kind: torch.dtype) -> None:
    """Let the layer act through its weight, which is float8 with its scales in `float8_scale`, and
    answer in `kind`; it keeps no other weight but one without data."""
    layer.register_buffer("float8", layer.weight.data, persistent=False)
    shape = torch.empty(layer.weight.shape, dtype=kind, device="meta")
    layer.weight = torch.nn.Parameter(shape, requires_grad=False)


def is_float8_only(layer: torch.nn.Linear) -> bool:
    """Whether the layer has no weight but the float8 one."""
    return is_quantised(layer) and layer.weight.is_meta


def quantise_weight(layer: torch.nn.Linear, weight: Tensor) -> None:
    """Let the layer act with `weight` (out, in) through a float8 copy; its own stays as it is."""
    values, scale = float8_rows(weight)
    if is_quantised(layer):
        for kept, new in zip(float8_copy(layer), (values, scale), strict=True):
            kept.copy_(new)
    else:
        layer.register_buffer("float8", values, persistent=False)
        layer.register_buffer("float8_scale", scale.contiguous(), persistent=False)


def float8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (out, in) in float8, and the scales of its rows (1, out) float32."""
    values, scale, _ = _quantised(weight[None].contiguous(), 0, len(weight))
    return values, scale.t()


def group_norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool
) -> Tensor:
    """GroupNorm, then SiLU with `silu`, of `x` (batch, channels, height, width), channels last."""
    if kernels := _kernels(x):
        made: Tensor = kernels.group_norm(
            x.contiguous(memory_format=torch.channels_last), groups, weight, bias, eps, silu
        )
        return made
    normed = F.group_norm(x.float(), groups, weight.float(), bias.float(), eps)
    return (F.silu(normed) if silu else normed).to(x.dtype)
