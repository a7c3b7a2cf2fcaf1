"""Reads the header of a .safetensors file with every bound checked; no tensor is touched.

Source: the safetensors format, an 8-byte little-endian length followed by that many bytes of JSON.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from klein.errors import LoraError

MAX_HEADER_BYTES = 64 * 1024 * 1024
_ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True, slots=True)
class Header:
    """Shapes by tensor name, and the metadata strings as written."""

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]


def read(path: Path) -> Header:
    """The header of the file at `path`; raises LoraError with the reason if it is not sound."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise _unsound(path, "it is not a safetensors file, or it is cut off")
            raw = file.read(length)
    except OSError as error:
        raise LoraError(f"LoRA {path.name!r} cannot be read: {error.strerror}") from error
    return _parse(path, raw, size - 8 - length)


def _parse(path: Path, raw: bytes, data_bytes: int) -> Header:
    try:
        entries = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _unsound(path, "its header is not JSON") from error
    if not isinstance(entries, dict):
        raise _unsound(path, "its header is not a table")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise _unsound(path, "its metadata is not a table")
    shapes, spans = {}, []
    for name, entry in entries.items():
        shapes[name], span = _tensor(path, name, entry)
        spans.append(span)
    spans.sort()
    ends = [0, *(end for _, end in spans)]
    if [begin for begin, _ in spans] != ends[:-1] or ends[-1] != data_bytes:
        raise _unsound(path, "its tensors do not fill the file: the download is incomplete")
    if not shapes:
        raise _unsound(path, "it holds no tensors")
    return Header(shapes, {str(k): str(v) for k, v in metadata.items()})


def _tensor(path: Path, name: str, entry: object) -> tuple[tuple[int, ...], tuple[int, int]]:
    try:
        assert isinstance(entry, dict)
        item = _ITEM_BYTES[entry["dtype"]]
        shape = tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        assert all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        assert end - begin == math.prod(shape) * item
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise _unsound(path, f"the entry of tensor {name[:80]!r} makes no sense") from error
    return shape, (begin, end)


def _unsound(path: Path, why: str) -> LoraError:
    return LoraError(f"LoRA {path.name!r} is damaged: {why}")
