"""The tensors of LoRA files: read onto a device, proved, and kept for their next use."""

from collections import OrderedDict
from collections.abc import Callable, Container, Iterator
from pathlib import Path

import torch
from torch import Tensor

from klein.errors import LoraError
from klein.inference import memory
from klein.inference.loading import reader
from klein.lora.file import LoraFile
from klein.models.catalog import GB
from klein.models.machine import memory_free
from klein.sources.safetensors import Entry

KEPT_BYTES = 2 * 1024**3
"""Of recently used LoRAs kept on the device, so that their second use reads no file."""

Factors = dict[str, Tensor]
"""A LoRA's tensors by their names in its file, as stored."""


def read(file: LoraFile, device: torch.device) -> Factors:
    """The tensors of `file` on `device`, in memory of their own; raises LoraUnavailable if they are
    not those that were inspected."""

    def load(fd: int, entries: tuple[Entry, ...]) -> Factors:
        tensors = {
            entry.name: torch.empty(entry.shape, dtype=reader.DTYPES[entry.dtype], device=device)
            for entry in entries
        }
        placed = [(entry, (tensors[entry.name],)) for entry in entries]
        reader.mover(device)(reader.chunks_of(fd, file.path, placed))
        return tensors

    def raw(tensors: Factors) -> Iterator[memoryview]:
        return (t.cpu().reshape(-1).view(torch.uint8).numpy().data for t in tensors.values())

    with torch.inference_mode(mode=False):  # the threads that fill them are outside of it
        return file.load(load, raw)


def require_no_biases(file: LoraFile, tensors: Factors) -> None:
    """Raise LoraError for a file that changes biases, of which its model has none; zeros do not."""
    for name in file.biases:
        if tensors[name].any():
            raise LoraError(
                f"LoRA {file.name!r} changes biases, which this model does not have: {name[:90]!r}"
            )


def free_bytes(device: torch.device) -> int:
    """Memory that can be had on `device`."""
    return memory.free_bytes() if device.type == "cuda" else memory_free(Path("/"))


class FactorCache:
    """The factors of the LoRAs used last; `free` gives the bytes to be had on a device."""

    def __init__(self, free: Callable[[torch.device], float]) -> None:
        self._free = free
        self._kept: OrderedDict[str, Factors] = OrderedDict()

    def get(self, file: LoraFile, device: torch.device, in_use: Container[str]) -> Factors:
        """The factors of `file`, read onto `device` unless they are here. Those of other files than
        `in_use`, by sha256, make room for them.

        Raises LoraError for a file that does not fit, and LoraUnavailable as `read` does.
        """
        if file.sha256 not in self._kept:
            self._make_room(file, device, in_use)
            self._kept[file.sha256] = read(file, device)
        self._kept.move_to_end(file.sha256)
        while len(self._kept) > 1 and self.nbytes() > KEPT_BYTES:
            self._kept.popitem(last=False)
        return self._kept[file.sha256]

    def nbytes(self) -> int:
        """Bytes that are held."""
        return sum(t.nbytes for factors in self._kept.values() for t in factors.values())

    def clear(self) -> None:
        """Let go of everything."""
        self._kept.clear()

    def _make_room(self, file: LoraFile, device: torch.device, in_use: Container[str]) -> None:
        need = file.identity.size
        for sha256 in list(self._kept):
            if need > self._free(device) and sha256 not in in_use:
                del self._kept[sha256]
        if need > (free := self._free(device)):
            raise LoraError(
                f"LoRA {file.name!r} needs {need / GB:.1f} GB of memory beside the weights and the "
                f"LoRAs before it, and {max(0, free) / GB:.1f} GB are free: use fewer LoRAs at "
                "once, or one of a lower rank"
            )
