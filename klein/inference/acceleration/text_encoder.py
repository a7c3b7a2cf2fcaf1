"""The text encoder as one CUDA graph: launching its kernels takes longer than running them."""

import logging
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)


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
