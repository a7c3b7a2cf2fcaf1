"""The text encoder as one CUDA graph, as launching its kernels takes longer than running them, and
with its linears in float8."""

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from klein.inference.acceleration.ops import (
    FP8,
    linear,
    round_rows,
    rows,
    use_float8_weight,
)

log = logging.getLogger(__name__)

MULTIPLE = 16
"""What a GPU's float8 product wants both sides of a weight to be a multiple of."""


class Float8Linear(torch.nn.Linear):
    """A linear without bias that acts through float8 rows, of its weight and of what it is given;
    padded with zeros where a GPU could not multiply them otherwise."""

    def __init__(self, layer: torch.nn.Linear, kind: torch.dtype) -> None:
        """In place of `layer`, whose weight may be float8 already, with its scales in
        `float8_scale`; answers in `kind`."""
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        values = layer.weight.data
        if values.dtype == FP8:
            scale = layer.get_buffer("float8_scale")
        else:
            values, scale = round_rows(values)
        more_outputs, self._more_inputs = (-side % MULTIPLE for side in values.shape)
        as_bytes = values.view(torch.uint8)  # whose zero is float8's
        padded = F.pad(as_bytes, (0, self._more_inputs, 0, more_outputs)).view(FP8)
        self.weight = torch.nn.Parameter(padded, requires_grad=False)
        by_row = F.pad(scale.view(1, -1), (0, more_outputs))
        self.register_buffer("float8_scale", by_row, persistent=False)
        use_float8_weight(self, kind)

    def forward(self, input: Tensor) -> Tensor:
        """(batch, tokens, in) to (batch, tokens, out)."""
        x = F.pad(input, (0, self._more_inputs)) if self._more_inputs else input.contiguous()
        return linear(self, rows(x, 0, x.shape[1], True))[..., : self.out_features]


def use_float8(encoder: Any) -> None:
    """Let the linears of a Qwen3ForCausalLM's layers act through float8 weights."""
    kind = encoder.get_input_embeddings().weight.dtype
    found = {
        name: module
        for name, module in encoder.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("model.layers.")
    }
    for name, layer in found.items():
        encoder.set_submodule(name, Float8Linear(layer, kind))


class CudaGraphEncoder:
    """The forward of a Qwen3ForCausalLM, recorded for texts of `length` tokens.

    Its outputs are overwritten by the next call. Other lengths, and all where no graph can be
    made, go through the forward itself.
    """

    def __init__(self, encoder: Any, length: int) -> None:
        self._forward = encoder
        self._length = length
        self._graph: torch.cuda.CUDAGraph | None = None
        self._given: tuple[Tensor, Tensor] | None = None
        self._made: Any = None
        self._possible = True

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, **asked: Any) -> Any:
        """As the forward: `input_ids` and `attention_mask` (1, tokens)."""
        if input_ids.shape == (1, self._length) and self._possible and self._graph is None:
            self._capture(input_ids, attention_mask, asked)
        if input_ids.shape != (1, self._length) or self._graph is None or self._given is None:
            return self._forward(input_ids=input_ids, attention_mask=attention_mask, **asked)
        self._given[0].copy_(input_ids)
        self._given[1].copy_(attention_mask)
        self._graph.replay()
        return self._made

    def _capture(self, input_ids: Tensor, attention_mask: Tensor, asked: dict[str, Any]) -> None:
        """Run the forward once for its own sake, as CUDA asks, and record it."""
        self._possible = False
        self._given = input_ids.clone(), attention_mask.clone()
        graph = torch.cuda.CUDAGraph()
        try:
            self._forward(input_ids=self._given[0], attention_mask=self._given[1], **asked)
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._made = self._forward(
                    input_ids=self._given[0], attention_mask=self._given[1], **asked
                )
        except RuntimeError as error:
            log.warning("the text encoder runs without a CUDA graph: %s", str(error)[:200])
            return
        self._graph = graph
