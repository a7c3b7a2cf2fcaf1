"""Where the weights are while others work: model offload, and accelerate's sequential offload.

With model offload only one of the text encoder and the transformer is on the GPU. Their weights
stay in page-locked main memory and are copied from there. Nothing is copied back: whatever LoRAs
did to a copy is gone with it, and the originals are as they were loaded.
"""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

SMALL = 1024**2
"""Bytes; to page-lock less is not worth a call."""


def pin(tensors: Iterable[Tensor]) -> None:
    """Page-lock `tensors` where they are, so that a GPU copies them at the bus's full rate."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    refused = sum(
        int(runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)) != 0
        for tensor in tensors
        if tensor.nbytes >= SMALL and not tensor.is_pinned()
    )
    if refused:
        log.warning("%d weights could not be page-locked: moving them takes longer", refused)


def sequentially(device: str, *modules: Any) -> None:
    """Keep the weights of `modules` in main memory; each layer has its own on `device` while it
    works, and the parameters are on the meta device until `bring_back`."""
    from accelerate import cpu_offload  # type: ignore[import-untyped]

    for module in modules:
        own = any(True for _ in module.parameters(recurse=False))
        cpu_offload(module, torch.device(device), offload_buffers=own)


def bring_back(module: Any) -> None:
    """Put the weights of a module under sequential offload back, in main memory."""
    from accelerate.hooks import remove_hook_from_module  # type: ignore[import-untyped]

    remove_hook_from_module(module, recurse=True)


class ModelOffloader:
    """Has one of `modules`, which lie in main memory, on `device` at a time."""

    def __init__(self, device: str, *modules: Any) -> None:
        self._device = device
        self._originals = {id(module): _tensors(module) for module in modules}
        self._active: Any = None

    def originals(self, module: Any) -> dict[str, Tensor]:
        """The module's tensors in main memory, by name."""
        return {name: original for name, (_, original) in self._originals[id(module)].items()}

    def activate(self, module: Any) -> bool:
        """Let `module` work on the device, in place of the other; whether its weights are fresh."""
        if self._active is module:
            return False
        self._active = None
        for tensors in self._originals.values():
            for holder, original in tensors.values():
                holder.data = original
        with torch.inference_mode(False):
            for holder, original in self._originals[id(module)].values():
                holder.data = original.to(self._device, non_blocking=True, copy=True)
        self._active = module
        return True

    def room_for(self, module: Any) -> int:
        """Bytes on the device that `activate` takes; less than none if the other is larger."""
        return self._size(module) - self._size(self._active)

    def _size(self, module: Any) -> int:
        if module is None:
            return 0
        return sum(original.nbytes for original in self.originals(module).values())


def _tensors(module: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Parameters and buffers by name: what holds each, and what it holds."""
    named = (*module.named_parameters(), *module.named_buffers())
    return {name: (holder, holder.data) for name, holder in named if not holder.is_meta}
