"""The Triton kernels against the plain torch that klein.inference.acceleration.ops also is.

    python -m pytest tests/gpu                      # on a machine with a GPU

Without a GPU, `TRITON_INTERPRET=1` and an installed triton run them on the CPU.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from klein.inference.acceleration import ops as fused

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not torch.cuda.is_available() and not INTERPRETED:
    pytest.skip("no GPU here", allow_module_level=True)

from klein.inference.acceleration import kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(192, 6, 32, 576), (256, 2, 128, 768)] + ([] if INTERPRETED else [(4096, 32, 128, 12288)])
"""Width, heads, dim of a head, width of the feed-forward."""
QUANTISED = [False] if INTERPRETED else [False, True]
"""The interpreter has no float8."""


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def angles(tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, the same for both of a pair, as the model makes them."""
    cosines, sines = random(2, tokens, dim // 2, dtype=torch.float32).repeat_interleave(2, -1)
    return cosines, sines


def plain(made: Tensor | fused.Rows) -> Tensor:
    """A product's input as float32, whatever form it is in."""
    if isinstance(made, fused.Rows):
        whole: Tensor = (made.values.float() * made.scale).unflatten(0, (made.batch, -1))
        return whole
    return made.float()


def on_kernels(work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The result of klein.inference.acceleration.ops by its kernels, on whatever device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_kernels", lambda _: kernels)
        return work(*args, **kwargs)


def in_torch(work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The result of klein.inference.acceleration.ops in plain torch, from float32 inputs."""

    def widen(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.float().cpu()
        if isinstance(value, tuple):
            return tuple(widen(each) for each in value)
        return value

    return work(*map(widen, args), **{name: widen(value) for name, value in kwargs.items()})


def error(made: Tensor, expected: Tensor) -> float:
    made, expected = made.float().cpu(), expected.float()
    assert made.isfinite().all()
    return float((made - expected).norm() / expected.norm())


@pytest.mark.parametrize("quantised", QUANTISED)
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(("width", "heads", "dim", "middle"), SIZES)
def test_norm_and_modulation(
    width: int, heads: int, dim: int, middle: int, added: bool, quantised: bool
) -> None:
    """Normed, modulated rows, and the sum that they were made from, equal plain torch's."""
    x = random(2, 37, width)
    shift, scale, gate = random(3, width).unbind()
    more = (gate, random(2, 37, width)) if added else None
    x_kept, expected_x = x.clone(), x.float().cpu().clone()
    made = on_kernels(fused.norm_modulate, x_kept, shift, scale, 1e-6, quantised, more)
    args = (expected_x, shift, scale, 1e-6, False, more)
    expected = in_torch(lambda _, *rest: fused.norm_modulate(expected_x, *rest), *args)
    assert error(plain(made), expected) < (4e-2 if quantised else 4e-3)
    assert error(x_kept, expected_x) < 4e-3


@pytest.mark.parametrize(("width", "heads", "dim", "middle"), SIZES)
def test_joined_heads(width: int, heads: int, dim: int, middle: int) -> None:
    """Two streams' heads lie behind one another, normed and rotated by their own positions."""
    text, image = 5, 11
    made = [torch.full((2, text + image, heads, dim), torch.nan, device=DEVICE) for _ in range(3)]
    made = [each.to(torch.bfloat16) for each in made]
    expected = [torch.empty(2, text + image, heads, dim) for _ in range(3)]
    rope = angles(text + image, dim)
    for offset, tokens in ((0, text), (text, image)):
        q, k, v = (random(2, tokens, heads * dim) for _ in range(3))
        qkv = q, k, v
        norms = random(dim), random(dim)
        on_kernels(fused.join_heads, qkv, norms, rope, tuple(made), offset, 1e-6)
        in_torch(
            lambda qkv, norms, rope, offset: fused.join_heads(
                qkv, norms, rope, (expected[0], expected[1], expected[2]), offset, 1e-6
            ),
            qkv,
            norms,
            rope,
            offset,
        )
    for one, other in zip(made, expected, strict=True):
        assert error(one, other) < 4e-3


@pytest.mark.parametrize(("width", "heads", "dim", "middle"), SIZES)
def test_split_heads(width: int, heads: int, dim: int, middle: int) -> None:
    """q, k and v come out of the wide product of a single block."""
    hidden = random(2, 13, 3 * heads * dim + 2 * middle)
    norms = random(dim), random(dim)
    rope = angles(13, dim)
    made = on_kernels(fused.split_heads, hidden, heads, norms, rope, 1e-6)
    expected = in_torch(fused.split_heads, hidden, heads, norms, rope, 1e-6)
    for one, other in zip(made, expected, strict=True):
        assert error(one, other) < 4e-3


@pytest.mark.parametrize("quantised", QUANTISED)
@pytest.mark.parametrize("keep", [None, (4, 13), (4, 9)])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize(("width", "heads", "dim", "middle"), SIZES)
def test_swiglu(
    width: int,
    heads: int,
    dim: int,
    middle: int,
    joined: bool,
    keep: tuple[int, int] | None,
    quantised: bool,
) -> None:
    """silu(gate) · up behind what attention gave, without the tokens that are left out."""
    hidden = random(2, 13, (3 * width if joined else 0) + 2 * middle)
    attended = random(2, 13, width) if joined else None
    gate_at = 3 * width if joined else 0
    made = on_kernels(fused.swiglu, hidden, gate_at, quantised, attended, keep)
    expected = in_torch(fused.swiglu, hidden, gate_at, False, attended, keep)
    assert plain(made).shape == expected.shape
    assert error(plain(made), expected) < (4e-2 if quantised else 4e-3)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("channels", [24, 96, 512])
def test_group_norm(channels: int, silu: bool) -> None:
    """Channels-last group norm equals torch's, also far from zero."""
    x = (random(2, channels, 19, 23) * 2 + 5).to(memory_format=torch.channels_last)
    weight, bias = random(channels), random(channels)
    made = on_kernels(fused.group_norm, x, 8, weight, bias, 1e-6, silu)
    expected = in_torch(fused.group_norm, x, 8, weight, bias, 1e-6, silu)
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert error(made, expected) < 4e-3


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no float8")
def test_float8_product() -> None:
    """A float8 product of random rows is within float8's rounding of the true one."""
    layer = torch.nn.Linear(4096, 12288, bias=False, device=DEVICE, dtype=torch.bfloat16)
    x = random(1, 600, 4096)
    fused.quantise_weight(layer, layer.weight.detach())
    made = fused.linear(layer, fused.rows(x, 3, 600, True))
    expected = x[:, 3:].float().cpu() @ layer.weight.detach().float().cpu().t()
    assert made.shape == (1, 597, 12288)
    assert error(made, expected) < 6e-2
