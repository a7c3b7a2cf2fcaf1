"""Reads a model's weights from its files onto the device once, many large chunks at a time.

`from_pretrained` goes through the files one mapped page and one tensor after another. Here threads
read chunks of neighbouring tensors into page-locked memory and a stream of its own carries them on,
while the empty model is built: a start takes about as long as the disk does. The models are those
of `from_pretrained`, bit for bit.

Source of the file format: the safetensors README; an 8-byte little-endian length, that many bytes
of JSON, the tensors."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import IO

import torch
from torch import Tensor

from klein.sources import safetensors
from klein.sources.safetensors import Entry

THREADS = 3
"""Reads in flight. 8 read no faster, and starve what else is read from the same disk (SPEED.md)."""
CHUNK_BYTES = 32 * 1024**2
BUFFERS = THREADS + 4
"""Page-locked chunks: one a thread, and some on their way to the device."""
MAX_PIECES = 512
"""Of one chunk; Linux takes 1024 in one read."""
STEMS = ("diffusion_pytorch_model", "model")
"""What diffusers and transformers call their weights."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

FILE_SCALE = "weight_scale"
"""Last part of the name of a float8 weight's scales, in a file."""

TensorFilter = Callable[[str], bool]
"""Whether the tensor of that name is to be read."""
Device = torch.device | str
Weights = Future[dict[str, Tensor]]
"""A part's tensors by name, once they are read."""


def read(
    source: Path | Sequence[Path],
    device: Device,
    dtype: torch.dtype,
    wanted: TensorFilter,
    *,
    keep_float8: bool = False,
) -> dict[str, Tensor]:
    """The wanted tensors of a folder of safetensors files, or of the files themselves, by name.

    Each is contiguous memory of its own on `device`; those of a floating point type become `dtype`,
    but with `keep_float8` for float8 weights and their scales. Nothing else is read, and shards
    with nothing wanted are not opened. Raises ValueError for a file that is cut off or damaged,
    before its tensors are read, and OSError as the disk does.
    """
    device = exact(device)
    tensors: dict[str, Tensor] = {}

    def place(entry: Entry) -> Sequence[Tensor]:
        if not wanted(entry.name):
            return ()
        stored = DTYPES[entry.dtype]
        cast = stored.is_floating_point and not (keep_float8 and _is_quantised(entry))
        kind = dtype if cast else stored
        tensors[entry.name] = torch.empty(entry.shape, dtype=kind, device=device)
        return (tensors[entry.name],)

    fill(_files(source, wanted), device, place)
    return tensors


def _is_quantised(entry: Entry) -> bool:
    return DTYPES[entry.dtype] == torch.float8_e4m3fn or entry.name.endswith(f".{FILE_SCALE}")


def fill(files: Sequence[Path], device: Device, place: Callable[[Entry], Sequence[Tensor]]) -> None:
    """Read every tensor of `files` that `place` gives somewhere to go: contiguous tensors on
    `device`, which its elements fill one after another. Raises as `read`."""
    chunks: list[Chunk] = []
    with ExitStack() as opened:
        for path in files:
            file = opened.enter_context(path.open("rb"))
            if hasattr(os, "posix_fadvise"):  # not on macOS
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            placed = [(entry, place(entry)) for entry in _header(file, path)]
            chunks += chunks_of(file.fileno(), path, placed)
        mover(exact(device))(chunks)


def mover(device: torch.device) -> "Callable[[list[Chunk]], None]":
    """What brings chunks to their tensors on `device`; they are there when it returns."""
    return Staging(device).move if device.type == "cuda" else partial(_each, _straight)


def exact(device: Device) -> torch.device:
    """`device` with its index: the current one is each thread's own."""
    return torch.empty(0, device=device).device


def _files(source: Path | Sequence[Path], wanted: TensorFilter) -> list[Path]:
    """The files of `source` that hold something wanted, as far as an index says."""
    if not isinstance(source, Path):
        return list(source)
    for stem in STEMS:
        index = source / f"{stem}.safetensors.index.json"
        if index.is_file():
            return [source / shard for shard in _shards(index, wanted)]
        if (single := source / f"{stem}.safetensors").is_file():
            return [single]
    raise ValueError(f"there are no safetensors weights in {source.name}: download the model again")


def _shards(index: Path, wanted: TensorFilter) -> list[str]:
    """The names of the files that an index says hold something wanted, in order."""
    try:
        shards: dict[str, str] = json.loads(index.read_text())["weight_map"]
        return sorted({shard for name, shard in shards.items() if wanted(name)})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(index, "it is not an index of weights") from error


def _header(file: IO[bytes], path: Path) -> tuple[Entry, ...]:
    """The tensors of a file in the order they lie in it; raises ValueError if it is not sound."""
    try:
        return safetensors.read(file).entries
    except safetensors.Damaged as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(
        f"{path.parent.name}/{path.name} is cut off or damaged: {why}; "
        "delete it and download it again"
    )


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighbouring elements of a destination tensor, shape (n,), and the type its file has."""

    into: Tensor
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self.into.numel() * self.dtype.itemsize

    @property
    def as_is(self) -> bool:
        """Whether the tensor has the file's type."""
        return self.dtype == self.into.dtype

    def land(self, raw: Tensor) -> None:
        """Put the file's bytes `raw`, shape (size,), in place, queued on the current stream."""
        if self.as_is:
            self.into.view(torch.uint8).copy_(raw, non_blocking=True)
        else:
            there = raw.to(self.into.device, non_blocking=True)
            self.into.copy_(there.view(self.dtype))


@dataclass(slots=True)
class Chunk:
    """Pieces that lie side by side in an open file, from byte `offset` on."""

    fd: int
    path: Path
    offset: int
    pieces: list[Piece] = field(default_factory=list)
    size: int = 0

    def takes(self, offset: int, item: int) -> bool:
        """Whether an element of `item` bytes at `offset` comes next, and fits."""
        return (
            self.offset + self.size == offset
            and self.size + item <= CHUNK_BYTES
            and len(self.pieces) < MAX_PIECES
        )

    def add(self, piece: Piece) -> None:
        """Put `piece` at the end."""
        self.pieces.append(piece)
        self.size += piece.size

    def fill(self, targets: list[Tensor]) -> None:
        """Read the chunk into `targets`, bytes in main memory, one after another."""
        views = [target.numpy().data for target in targets]
        offset = self.offset
        while views:
            got = os.preadv(self.fd, views, offset)
            if not got:
                raise _damaged(self.path, f"it ends at byte {offset}")
            offset += got
            while views and got >= len(views[0]):
                got -= len(views.pop(0))
            if got:
                views[0] = views[0][got:]


def chunks_of(fd: int, path: Path, placed: Iterable[tuple[Entry, Sequence[Tensor]]]) -> list[Chunk]:
    """Entries in file order with where they go, in chunks of up to CHUNK_BYTES; none is cut within
    an element."""
    chunks: list[Chunk] = []
    for entry, targets in placed:
        dtype = DTYPES[entry.dtype]
        item, offset = dtype.itemsize, entry.begin
        for flat in (target.view(-1) for target in targets):
            done = 0
            while done < flat.numel():
                if not chunks or not chunks[-1].takes(offset, item):
                    chunks.append(Chunk(fd, path, offset))
                count = min(flat.numel() - done, (CHUNK_BYTES - chunks[-1].size) // item)
                chunks[-1].add(Piece(flat[done : done + count], dtype))
                done += count
                offset += count * item
    return chunks


def _each(move: Callable[[Chunk], None], chunks: list[Chunk]) -> None:
    """Move every chunk, THREADS at a time; the first error stops the rest."""
    with ThreadPoolExecutor(THREADS, thread_name_prefix="klein-read") as pool:
        for _ in pool.map(move, chunks):
            pass


def _straight(chunk: Chunk) -> None:
    """Read a chunk into main memory where it belongs; beside it, what changes its type."""
    raws = [
        piece.into.view(torch.uint8) if piece.as_is else torch.empty(piece.size, dtype=torch.uint8)
        for piece in chunk.pieces
    ]
    chunk.fill(raws)
    for piece, raw in zip(chunk.pieces, raws, strict=True):
        if not piece.as_is:
            piece.land(raw)


class Staging:
    """Page-locked buffers between the files and a GPU, and the stream that empties them."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffers: SimpleQueue[tuple[Tensor, torch.cuda.Event] | None] = SimpleQueue()
        for _ in range(BUFFERS):
            self._buffers.put(None)

    def move(self, chunks: list[Chunk]) -> None:
        """Bring `chunks` to the device; they are there when this returns."""
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        try:
            _each(self._carry, chunks)
        finally:
            self._stream.synchronize()

    def _carry(self, chunk: Chunk) -> None:
        with torch.cuda.stream(self._stream):
            buffer = self._buffers.get()
            try:
                buffer = buffer or new_buffer()
                host, emptied = buffer
                emptied.synchronize()
                filled = host[: chunk.size]
                chunk.fill([filled])
                raws = torch.split(filled, [piece.size for piece in chunk.pieces])
                for piece, raw in zip(chunk.pieces, raws, strict=True):
                    piece.land(raw)
                emptied.record()
            finally:
                self._buffers.put(buffer)


def new_buffer() -> tuple[Tensor, torch.cuda.Event]:
    """A page-locked chunk, and the event that says when its last copy is done."""
    host = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
    return host, torch.cuda.Event()  # type: ignore[no-untyped-call]
