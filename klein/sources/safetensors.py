"""Reads the header of a .safetensors file with every bound checked; no tensor is touched.

Source: the safetensors format, an 8-byte little-endian length followed by that many bytes of JSON,
then the tensors, one after another without a gap.
"""

import errno
import json
import math
import os
import stat
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO

MAX_HEADER_BYTES = 100_000_000
"""safetensors' own bound."""
MAX_TENSORS = 100_000
MAX_NAME = 512
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 2**48
ITEM_BYTES = {
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
"""The types that are read, by their names in a header."""

Shape = tuple[int, ...]


class Damaged(ValueError):
    """Why a file is no sound safetensors file, in words that follow a colon; it names no file."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: bytes `begin` to `end` of its file; `dtype` is a name from ITEM_BYTES."""

    name: str
    dtype: str
    shape: Shape
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """The tensors in the order they lie in the file, and the metadata as written."""

    entries: tuple[Entry, ...]
    metadata: dict[str, str]

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shapes by tensor name."""
        return {entry.name: entry.shape for entry in self.entries}


def open_regular(path: Path) -> BufferedReader:
    """`path` to read, if it is a file at all: a pipe or a device would keep its reader for ever.
    Raises OSError."""
    file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no regular file")
    return file


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def read(file: IO[bytes], max_header_bytes: int = MAX_HEADER_BYTES) -> Header:
    """The header of an open file, which is left behind it; raises Damaged, and OSError as the
    disk does."""
    size = os.fstat(file.fileno()).st_size
    length = header_length(file.read(8), size, max_header_bytes)
    return parse(file.read(length), size)


def header_length(start: bytes, size: int, max_header_bytes: int = MAX_HEADER_BYTES) -> int:
    """Bytes of the JSON after the first 8 of a file of `size` bytes; raises Damaged."""
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or not 2 <= length <= size - 8:
        raise Damaged("it is not a safetensors file, or its header does not end")
    if length > max_header_bytes:
        raise Damaged(f"its header has {length} bytes, {max_header_bytes} are the most")
    return length


def parse(raw: bytes, size: int) -> Header:
    """The header whose JSON is `raw`, of a file of `size` bytes; raises Damaged."""
    table = _table(raw)
    metadata = _metadata(table.pop("__metadata__", {}))
    start = 8 + len(raw)
    entries = sorted(
        (_entry(name, row, start) for name, row in table.items()),
        key=lambda entry: (entry.begin, entry.end),
    )
    place = start
    for entry in entries:
        if entry.begin != place:
            raise Damaged("its tensors leave gaps or overlap: the download is incomplete")
        place = entry.end
    if place != size:
        raise Damaged(f"it has {size} bytes and its header promises {place}")
    return Header(tuple(entries), metadata)


def _table(raw: bytes) -> dict[str, object]:
    """The JSON object, its parts counted before any is made."""
    if raw.count(b"{") + raw.count(b"[") > 4 * MAX_TENSORS:
        raise Damaged(f"its header has too many parts; {MAX_TENSORS} tensors are the most")
    try:
        table = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Damaged("its header is not JSON") from error
    if not isinstance(table, dict):
        raise Damaged("its header is not a table")
    if len(table) > MAX_TENSORS:
        raise Damaged(f"it has {len(table)} tensors, {MAX_TENSORS} are the most")
    return table


def _metadata(stored: object) -> dict[str, str]:
    if not isinstance(stored, dict) or not all(isinstance(x, str) for x in stored.values()):
        raise Damaged("its metadata is not a table of texts")
    return {_clean(key): _clean(value) for key, value in stored.items()}


def _clean(text: str) -> str:
    """`text` without lone surrogates, which JSON can write and nothing can encode."""
    return text.encode("utf-8", "replace").decode()


def _entry(name: str, row: object, start: int) -> Entry:
    short = name[:80]
    if len(name) > MAX_NAME or not name.isprintable():
        raise Damaged(f"the tensor name {short!r}… is too long or not printable")
    if not isinstance(row, dict):
        raise Damaged(f"the entry of tensor {short!r} makes no sense")
    dtype = row.get("dtype")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise Damaged(f"tensor {short!r} is of the unknown type {str(dtype)[:20]!r}")
    shape, span = _numbers(row.get("shape")), _numbers(row.get("data_offsets"))
    if shape is None or span is None or len(span) != 2:
        raise Damaged(f"the entry of tensor {short!r} makes no sense")
    if span[1] - span[0] != math.prod(shape) * ITEM_BYTES[dtype]:
        raise Damaged(f"tensor {short!r} is not where it says")
    return Entry(name, dtype, shape, start + span[0], start + span[1])


def _numbers(stored: object) -> Shape | None:
    """A short list of sizes, or None for anything else."""
    if not isinstance(stored, list) or len(stored) > MAX_DIMENSIONS:
        return None
    if not all(type(n) is int and 0 <= n <= MAX_ELEMENTS for n in stored):
        return None
    return tuple(stored)
