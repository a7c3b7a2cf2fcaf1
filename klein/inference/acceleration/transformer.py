"""Flux2Transformer2DModel's forward over its own weights, with few kernels between the products.

It reads the weights where diffusers keeps them, so LoRAs merge into them as ever. A test holds it
to diffusers' forward, and the start of a server does so again on the GPU it runs on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from klein.inference.acceleration.ops import (
    FP8,
    Rows,
    is_quantised,
    join_heads,
    linear,
    norm_modulate,
    quantise_weight,
    rows,
    split_heads,
    swiglu,
    use_float8_weight,
)

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of q, k and v (batch, tokens, heads, dim), in any strides; the same shape."""


def block_linears(model: Any) -> dict[str, torch.nn.Linear]:
    """The linears of the blocks, by name: nearly all the work, and what float8 touches."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "transformer_blocks." in name
    }


def quantise(model: Any, device: str) -> None:
    """Let the block linears act on `device` through float8 copies of their weights, or through
    their weights where those are float8 already.

    The weights themselves stay where they are; everything else of the model goes to `device`.
    """
    for layer in block_linears(model).values():
        if layer.weight.dtype == FP8:
            use_float8_weight(layer, model.x_embedder.weight.dtype)
        else:
            quantise_weight(layer, layer.weight.to(device))
    for module in model.modules():
        if not is_quantised(module):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                tensor.data = tensor.data.to(device)


class FusedForward:
    """The forward of `model` (a Flux2Transformer2DModel without guidance embedding); through the
    float8 copies of its weights where it has them, unless `float8` says not to."""

    def __init__(self, model: Any, attention: Attention, *, float8: bool = True) -> None:
        self._model = model
        self._float8 = float8
        self._attend = attention
        self._heads = model.config.num_attention_heads
        self._dim = model.config.attention_head_dim
        self._eps = model.config.eps
        self._positions: _Positions | None = None

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        **_: Any,
    ) -> tuple[Tensor]:
        """Velocities (n, image tokens, 128) for n texts, of latents (n or 1, tokens, 128).

        The tokens are those of the image, with time id 0, and then those of references, whose
        velocities nobody needs. `encoder_hidden_states` (n, text tokens, joint_attention_dim),
        `timestep` 0 to 1 and the same for the whole batch; ids as the pipeline makes them.
        """
        model = self._model
        steps = model.time_guidance_embed(timestep[:1].to(hidden_states.dtype) * 1000, None)
        at = self._located(img_ids, txt_ids)
        on_image, on_text = model.double_stream_modulation_img, model.double_stream_modulation_txt
        x = self._double_blocks(
            _Stream(model.x_embedder(hidden_states), on_image(steps)[0].chunk(6)),
            _Stream(model.context_embedder(encoder_hidden_states), on_text(steps)[0].chunk(6)),
            at.rope,
        )
        shift, scale, gate = model.single_stream_modulation(steps)[0].chunk(3)
        x, added = self._single_blocks(x, shift, scale, gate, at)
        scale, shift = model.norm_out.linear(model.norm_out.silu(steps))[0].chunk(2)
        out = norm_modulate(x, shift, scale, self._eps, False, added)
        return (model.proj_out(out),)

    def _located(self, img_ids: Tensor, txt_ids: Tensor) -> "_Positions":
        """Where the tokens are; made once for a picture's steps."""
        text, known = txt_ids.shape[-2], self._positions
        if known is None or known.img_ids is not img_ids or known.image[0] != text:
            ids = [each[0] if each.ndim == 3 else each for each in (txt_ids, img_ids)]
            tables = [self._model.pos_embed(each) for each in ids]
            cosine, sine = (torch.cat(parts) for parts in zip(*tables, strict=True))
            image = text, text + int((ids[1][:, 0] == 0).sum())
            self._positions = known = _Positions(img_ids, (cosine, sine), image)
        return known

    def _double_blocks(self, image: "_Stream", text: "_Stream", rope: Any) -> Tensor:
        """Both streams through the double blocks; joined, text first.

        An image stream that several texts share stays one until they meet in the first attention.
        """
        batch, length = text.x.shape[:2]
        total = length + image.x.shape[1]
        q, k, v = image.x.new_empty(3, batch, total, self._heads, self._dim).unbind()
        for block in self._model.transformer_blocks:
            attn = block.attn
            fp8 = self._float8 and is_quantised(attn.to_q)
            img, txt = image.normed(self._eps, fp8), text.normed(self._eps, fp8)
            norms = attn.norm_added_q.weight, attn.norm_added_k.weight
            txt_qkv = _three((attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), txt)
            join_heads(txt_qkv, norms, rope, (q, k, v), 0, self._eps)
            norms = attn.norm_q.weight, attn.norm_k.weight
            img_qkv = _three((attn.to_q, attn.to_k, attn.to_v), img)
            for first in range(0, batch, len(image.x)):
                some = slice(first, first + len(image.x))
                join_heads(img_qkv, norms, rope, (q[some], k[some], v[some]), length, self._eps)
            image.x = image.x.expand(batch, -1, -1).contiguous()
            attn_out = self._attended(q, k, v)
            img_out, txt_out = rows(attn_out, length, total, fp8), rows(attn_out, 0, length, fp8)
            image.feed(block.ff, attn.to_out[0], img_out, self._eps)
            text.feed(block.ff_context, attn.to_add_out, txt_out, self._eps)
        return torch.cat([text.summed(), image.summed()], 1)

    def _single_blocks(
        self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, at: "_Positions"
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """The image tokens after all single blocks but the last's addition, and that addition."""
        added = None
        blocks = self._model.single_transformer_blocks
        for block in blocks:
            attn = block.attn
            fp8 = self._float8 and is_quantised(attn.to_out)
            normed = norm_modulate(x, shift, scale, self._eps, fp8, added)
            hidden = linear(attn.to_qkv_mlp_proj, normed)
            norms = attn.norm_q.weight, attn.norm_k.weight
            attn_out = self._attended(*split_heads(hidden, self._heads, norms, at.rope, self._eps))
            keep = at.image if block is blocks[-1] else None
            fed = swiglu(hidden, 3 * self._heads * self._dim, fp8, attn_out, keep)
            added = gate, linear(attn.to_out, fed)
        return x[:, slice(*at.image)].contiguous(), added

    def _attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(batch, tokens, heads · dim), contiguous."""
        return self._attend(q, k, v).flatten(2).contiguous()


@dataclass(frozen=True, slots=True)
class _Positions:
    """Of all tokens: text, image, references. `rope` cosines and sines (all tokens, dim), `image`
    the first and the end of the image's tokens; `img_ids` are what they were made from."""

    img_ids: Tensor
    rope: tuple[Tensor, Tensor]
    image: tuple[int, int]


@dataclass(slots=True)
class _Stream:
    """The image's or the text's way through the double blocks.

    `x` (batch, tokens, width); `on` shift, scale and gate of attention and of the feed-forward;
    `added` (gate, value) is still to be added to `x`.
    """

    x: Tensor
    on: tuple[Tensor, ...]
    added: tuple[Tensor, Tensor] | None = None

    def normed(self, eps: float, fp8: bool) -> Tensor | Rows:
        """What goes into attention; `x` gets what was still to be added."""
        added, self.added = self.added, None
        return norm_modulate(self.x, self.on[0], self.on[1], eps, fp8, added)

    def feed(self, ff: Any, out: torch.nn.Linear, attn_out: Tensor | Rows, eps: float) -> None:
        """Add what attention gave, and leave to add what the feed-forward makes of the sum."""
        fp8 = isinstance(attn_out, Rows)
        added = self.on[2], linear(out, attn_out)
        fed = norm_modulate(self.x, self.on[3], self.on[4], eps, fp8, added)
        hidden = swiglu(linear(ff.linear_in, fed), 0, fp8)
        self.added = self.on[5], linear(ff.linear_out, hidden)

    def summed(self) -> Tensor:
        """`x` with what was still to be added."""
        return torch.addcmul(self.x, *self.added) if self.added else self.x


def _three(layers: tuple[torch.nn.Linear, ...], x: Tensor | Rows) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (linear(layer, x) for layer in layers)
    return q, k, v
