"""Triton kernels for what lies between the matrix products. Imported only where there is a GPU.

`ops` has the same functions in plain torch and says what each of them computes. Everything that a
model fixes is a compile-time constant and everything that a request changes is not, so one
compilation of each kernel serves every size, prompt, LoRA and seed.
"""

import logging
import tempfile
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

log = logging.getLogger(__name__)

FP8 = torch.float8_e4m3fn
FP8_MAX = tl.constexpr(448.0)
TINY = tl.constexpr(1e-12)


class Compilations:
    """How many kernels Triton has made ready in this process, compiled or read from its cache."""

    count = 0

    @classmethod
    def watch(cls) -> None:
        """Begin to count."""

        def one_more(**_: object) -> None:
            cls.count += 1

        triton.knobs.runtime.jit_post_compile_hook = one_more


def keep_in(folder: Path) -> None:
    """Compiled kernels go to and come from `folder`; Triton's key of their source, its version and
    the GPU passes over what is stale. Begins to count compilations."""
    Compilations.watch()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        log.warning("kernels are compiled anew by each worker: %s", error)
        return
    triton.knobs.cache.dir = str(folder)


@triton.jit
def _store_row(out, scales, row, cols, values, mask, WIDTH: tl.constexpr, QUANTISE: tl.constexpr):
    at = row * WIDTH + cols
    if QUANTISE:
        scale = tl.maximum(tl.max(tl.abs(values), axis=0), TINY) / FP8_MAX
        tl.store(scales + row, scale)
        tl.store(out + at, (values / scale).to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(out + at, values.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _norm_modulate(
    x,
    added,
    gate,
    shift,
    scale,
    out,
    scales,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    QUANTISE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < WIDTH
    at = row * WIDTH + cols
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        gates = tl.load(gate + cols, mask=mask, other=0.0).to(tl.float32)
        value += gates * tl.load(added + at, mask=mask, other=0.0).to(tl.float32)
        kept = value.to(x.dtype.element_ty)
        tl.store(x + at, kept, mask=mask)
        value = kept.to(tl.float32)
    centred = tl.where(mask, value - tl.sum(value, axis=0) / WIDTH, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / WIDTH + eps)
    stretch = 1.0 + tl.load(scale + cols, mask=mask, other=0.0).to(tl.float32)
    moved = normed * stretch + tl.load(shift + cols, mask=mask, other=0.0).to(tl.float32)
    moved = tl.where(mask, moved, 0.0)
    _store_row(out, scales, row, cols, moved, mask, WIDTH, QUANTISE)


@triton.jit
def _pairs(x, ROWS: tl.constexpr, DIMS: tl.constexpr):
    """Even and odd columns."""
    return tl.split(tl.reshape(x, (ROWS, DIMS // 2, 2)))


@triton.jit
def _rotated(
    source,
    weight,
    cosine,
    sine,
    at,
    mask,
    DIM: tl.constexpr,
    BH: tl.constexpr,
    BD: tl.constexpr,
    eps,
):
    """RMS-normed and rotated heads, float32 (heads, dims); pairs (2i, 2i + 1) turn together."""
    value = tl.load(source + at, mask=mask, other=0.0).to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value, axis=1) / DIM + eps)[:, None] * weight
    real, imaginary = _pairs(value, BH, BD)
    turned = tl.join(real * cosine - imaginary * sine, imaginary * cosine + real * sine)
    return tl.reshape(turned, (BH, BD))


@triton.jit(do_not_specialize=["tokens", "offset", "total"])
def _join_heads(
    q,
    k,
    v,
    q_weight,
    k_weight,
    cosines,
    sines,
    q_out,
    k_out,
    v_out,
    tokens,
    offset,
    total,
    eps,
    ROW: tl.constexpr,
    K_AT: tl.constexpr,
    V_AT: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COPY_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    position = offset + row % tokens
    target = ((row // tokens) * total + position) * (HEADS * DIM)
    heads = tl.arange(0, BLOCK_H)[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    mask = (heads < HEADS) & (dims < DIM)
    inside = dims < DIM
    angle = position * DIM + dims
    cosine, _ = _pairs(tl.load(cosines + angle, mask=inside, other=0.0), 1, BLOCK_D)
    sine, _ = _pairs(tl.load(sines + angle, mask=inside, other=0.0), 1, BLOCK_D)
    here = target + heads * DIM + dims
    at = row * ROW + heads * DIM + dims
    weight = tl.load(q_weight + dims, mask=inside, other=0.0).to(tl.float32)
    turned = _rotated(q, weight, cosine, sine, at, mask, DIM, BLOCK_H, BLOCK_D, eps)
    tl.store(q_out + here, turned.to(q_out.dtype.element_ty), mask=mask)
    weight = tl.load(k_weight + dims, mask=inside, other=0.0).to(tl.float32)
    turned = _rotated(k, weight, cosine, sine, at + K_AT, mask, DIM, BLOCK_H, BLOCK_D, eps)
    tl.store(k_out + here, turned.to(k_out.dtype.element_ty), mask=mask)
    if COPY_V:
        values = tl.load(v + at + V_AT, mask=mask)
        tl.store(v_out + here, values, mask=mask)


@triton.jit(do_not_specialize=["tokens", "offset", "total"])
def _swiglu(
    hidden,
    attended,
    out,
    scales,
    tokens,
    offset,
    total,
    ROW: tl.constexpr,
    GATE_AT: tl.constexpr,
    MIDDLE: tl.constexpr,
    ATTENDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_A: tl.constexpr,
    QUANTISE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    source = (row // tokens) * total + offset + row % tokens
    cols = tl.arange(0, BLOCK_M)
    mask = cols < MIDDLE
    at = source * ROW + GATE_AT + cols
    gate = tl.load(hidden + at, mask=mask, other=0.0).to(tl.float32)
    value = (
        gate * tl.sigmoid(gate) * tl.load(hidden + at + MIDDLE, mask=mask, other=0.0).to(tl.float32)
    )
    WIDTH: tl.constexpr = ATTENDED + MIDDLE
    kind = out.dtype.element_ty
    target = row * WIDTH
    if ATTENDED > 0:
        heads = tl.arange(0, BLOCK_A)
        inside = heads < ATTENDED
        drawn = tl.load(attended + source * ATTENDED + heads, mask=inside, other=0.0)
        if QUANTISE:
            drawn = drawn.to(tl.float32)
            most = tl.maximum(tl.max(tl.abs(value), axis=0), tl.max(tl.abs(drawn), axis=0))
            scale = tl.maximum(most, TINY) / FP8_MAX
            tl.store(scales + row, scale)
            value = value / scale
            drawn = drawn / scale
        tl.store(out + target + heads, drawn.to(kind), mask=inside)
        tl.store(out + target + ATTENDED + cols, value.to(kind), mask=mask)
    else:
        _store_row(out, scales, row, cols, value, mask, WIDTH, QUANTISE)


@triton.jit(do_not_specialize=["tokens", "offset", "total"])
def _quantise(x, out, scales, tokens, offset, total, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    source = (row // tokens) * total + offset + row % tokens
    cols = tl.arange(0, BLOCK)
    mask = cols < WIDTH
    value = tl.load(x + source * WIDTH + cols, mask=mask, other=0.0).to(tl.float32)
    _store_row(out, scales, row, cols, value, mask, WIDTH, True)


@triton.jit(do_not_specialize=["pixels", "per_program"])
def _channel_sums(
    x,
    sums,
    squares,
    pixels,
    per_program,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    PIXELS: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    image = tl.program_id(1).to(tl.int64)
    channels = tl.arange(0, BLOCK)[None, :]
    lines = tl.arange(0, PIXELS)[:, None]
    total = tl.zeros([PIXELS, BLOCK], tl.float32)
    square = tl.zeros([PIXELS, BLOCK], tl.float32)
    first = part * per_program
    last = tl.minimum(first + per_program, pixels)
    for start in range(first, last, PIXELS):
        pixel = start + lines
        mask = (pixel < last) & (channels < CHANNELS)
        at = (image * pixels + pixel) * CHANNELS + channels
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        total += value
        square += value * value
    at = (image * tl.num_programs(0) + part) * CHANNELS + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < CHANNELS
    tl.store(sums + at, tl.sum(total, axis=0), mask=inside)
    tl.store(squares + at, tl.sum(square, axis=0), mask=inside)


@triton.jit(do_not_specialize=["pixels"])
def _scale_channels(
    x,
    by,
    plus,
    out,
    pixels,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    PIXELS: tl.constexpr,
    SILU: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)[:, None]
    channels = tl.arange(0, BLOCK)[None, :]
    inside = channels < CHANNELS
    mask = (pixel < pixels) & inside
    at = (image * pixels + pixel) * CHANNELS + channels
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    value = value * tl.load(by + image * CHANNELS + channels, mask=inside, other=0.0)
    value += tl.load(plus + image * CHANNELS + channels, mask=inside, other=0.0)
    if SILU:
        value = value * tl.sigmoid(value)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


def _block(width: int) -> int:
    return int(triton.next_power_of_2(width))


def _out(rows: int, width: int, like: Tensor, quantise: bool) -> tuple[Tensor, Tensor]:
    """Room for rows and, if they are quantised, for their scales."""
    kind = FP8 if quantise else like.dtype
    out = torch.empty(rows, width, dtype=kind, device=like.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=like.device) if quantise else out
    return out, scales


def norm_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    quantise: bool,
    added: Tensor | None,
    gate: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `ops.norm_modulate`; returns rows and scales."""
    width = x.shape[-1]
    rows = x.numel() // width
    out, scales = _out(rows, width, x, quantise)
    _norm_modulate[(rows,)](
        x,
        x if added is None else added,
        x if gate is None else gate,
        shift,
        scale,
        out,
        scales,
        eps,
        WIDTH=width,
        BLOCK=_block(width),
        ADD=added is not None,
        QUANTISE=quantise,
        num_warps=8,
    )
    return out, scales


def join_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: tuple[Tensor, Tensor],
    rope: tuple[Tensor, Tensor],
    joint: tuple[Tensor, Tensor, Tensor | None],
    offset: int,
    eps: float,
    columns: tuple[int, int],
) -> None:
    """As `ops.join_heads`; `q`, `k`, `v` are contiguous, k and v begin at `columns`."""
    batch, total, heads, dim = joint[0].shape
    tokens = q.shape[1]
    _join_heads[(batch * tokens,)](
        q,
        k,
        v,
        *weights,
        *rope,
        joint[0],
        joint[1],
        joint[0] if joint[2] is None else joint[2],
        tokens,
        offset,
        total,
        eps,
        ROW=q.shape[-1],
        K_AT=columns[0],
        V_AT=columns[1],
        HEADS=heads,
        DIM=dim,
        BLOCK_H=_block(heads),
        BLOCK_D=_block(dim),
        COPY_V=joint[2] is not None,
        num_warps=8,
    )


def swiglu(
    hidden: Tensor, gate_at: int, attended: Tensor | None, start: int, stop: int, quantise: bool
) -> tuple[Tensor, Tensor]:
    """As `ops.swiglu` for tokens `start` to `stop`; returns rows and scales."""
    batch, total, row = hidden.shape
    middle = (row - gate_at) // 2
    width = 0 if attended is None else attended.shape[-1]
    tokens = stop - start
    out, scales = _out(batch * tokens, width + middle, hidden, quantise)
    _swiglu[(batch * tokens,)](
        hidden,
        hidden if attended is None else attended,
        out,
        scales,
        tokens,
        start,
        total,
        ROW=row,
        GATE_AT=gate_at,
        MIDDLE=middle,
        ATTENDED=width,
        BLOCK_M=_block(middle),
        BLOCK_A=_block(max(width, 1)),
        QUANTISE=quantise,
        num_warps=16,
    )
    return out, scales


def quantise(x: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """As `ops.rows`, quantised; returns rows and scales."""
    batch, total, width = x.shape
    tokens = stop - start
    out, scales = _out(batch * tokens, width, x, True)
    _quantise[(batch * tokens,)](
        x, out, scales, tokens, start, total, WIDTH=width, BLOCK=_block(width), num_warps=8
    )
    return out, scales


def group_norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool
) -> Tensor:
    """As `ops.group_norm`, for a channels-last `x` (batch, channels, height, width)."""
    batch, channels, height, wide = x.shape
    pixels = height * wide
    block = _block(channels)
    lines = max(1, 8192 // block)
    per_program = max(lines, triton.cdiv(pixels, 1024) // lines * lines)
    parts = triton.cdiv(pixels, per_program)
    sums = torch.empty(2, batch, parts, channels, dtype=torch.float32, device=x.device)
    _channel_sums[(parts, batch)](
        x, sums[0], sums[1], pixels, per_program, CHANNELS=channels, BLOCK=block, PIXELS=lines
    )
    means = sums.double().sum(2).view(2, batch, groups, -1).sum(-1) / (pixels * channels // groups)
    inverse = (means[1] - means[0] ** 2 + eps).rsqrt().repeat_interleave(channels // groups, 1)
    by = inverse * weight
    plus = bias - means[0].repeat_interleave(channels // groups, 1) * by
    out = torch.empty_like(x)
    _scale_channels[(triton.cdiv(pixels, lines), batch)](
        x,
        by.float(),
        plus.float(),
        out,
        pixels,
        CHANNELS=channels,
        BLOCK=block,
        PIXELS=lines,
        SILU=silu,
    )
    return out
