"""Prompts as the transformer reads them."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from klein.errors import InternalError
from klein.inference.loading.modules import OUT_LAYERS

KEPT = 16
"""Embeddings of recent texts; 12.6 MB each with the 9B model."""


class PromptEncoder:
    """Texts to embeddings, as Flux2KleinPipeline encodes them; those of recent texts are kept."""

    def __init__(
        self,
        forward: Callable[..., Any],
        tokenizer: Any,
        device: str,
        before: Callable[[], object] = lambda: None,
    ) -> None:
        """`forward` is the text encoder's; `before` is called before it is."""
        self._forward = forward
        self._tokenizer = tokenizer
        self._device = device
        self._before = before
        self._kept: OrderedDict[tuple[str, int], Tensor] = OrderedDict()

    def encode(self, text: str, length: int) -> Tensor:
        """Embeddings (1, length, 3 · hidden) of the first `length` tokens, padding included.

        Raises InternalError if they are not finite.
        """
        key = text, length
        if key not in self._kept:
            self._before()
            self._kept[key] = self._encoded(text, length)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def cut(self, text: str, length: int) -> str | None:
        """What is left out of `text`, in words, or None if all of it is read."""
        ids = self._tokenizer(self._chat(text))["input_ids"]
        if len(ids) <= length:
            return None
        tail = " ".join(self._tokenizer.decode(ids[:length]).split()[-6:])
        return f"was cut: it has {len(ids)} tokens and {length} are read, up to “…{tail}”"

    def forget(self) -> None:
        """Keep nothing."""
        self._kept.clear()

    def _encoded(self, text: str, length: int) -> Tensor:
        given = self._tokenizer(
            self._chat(text),
            return_tensors="pt",
            padding="max_length",
            truncation=True,
            max_length=length,
        )
        states = self._forward(
            input_ids=given["input_ids"].to(self._device),
            attention_mask=given["attention_mask"].to(self._device),
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
        embeddings = torch.cat([states[layer] for layer in OUT_LAYERS], dim=-1)
        if not embeddings.isfinite().all():
            raise InternalError(
                "the text encoder gave values that are not finite, so there is no image: try "
                "another prompt, or KLEIN_SPEED=eager"
            )
        return embeddings

    def _chat(self, text: str) -> str:
        made: str = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        return made
