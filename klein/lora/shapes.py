"""Which weight change the tensors of each kind of LoRA make, by their shapes alone."""

import math
from collections.abc import Mapping

from klein.sources.safetensors import Shape


def measure(kind: str, own: Mapping[str, Shape]) -> tuple[int, tuple[int, int]]:
    """Rank and (out, in) shape of the weight change that tensors of these shapes make, 0 for what
    they leave open.

    Raises KeyError or ValueError where they do not fit together.
    """
    if math.prod(own.get("alpha", ())) != 1:
        raise ValueError("alpha")
    rank, shape = _MEASURES[kind](own)
    if 0 in shape and kind != "oft":
        raise ValueError("empty")
    return rank, shape


def _lora(own: Mapping[str, Shape]) -> tuple[int, tuple[int, int]]:
    (rank, columns), (rows, same) = own["down"], own["up"]
    if rank != same or rank == 0 or not _is_by_rows(own.get("magnitude", (rows,)), rows):
        raise ValueError("lora")
    return rank, (rows, columns)


def _is_by_rows(shape: Shape, rows: int) -> bool:
    """Whether there is one magnitude for each output; LyCORIS can also write one for each input."""
    return shape[:1] == (rows,) and math.prod(shape) == rows


def _diff(own: Mapping[str, Shape]) -> tuple[int, tuple[int, int]]:
    rows, columns = (*own["diff"], 1)[:2]
    if math.prod(own["diff"]) != rows * columns:
        raise ValueError("diff")
    return 0, (rows, columns)


def _oft(own: Mapping[str, Shape]) -> tuple[int, tuple[int, int]]:
    """Of blocks of b inputs each; a single one is that of all inputs. Its b stands for the rank."""
    blocks, elements = own["oft"]
    side = (1 + math.isqrt(1 + 8 * elements)) // 2
    if side * (side - 1) // 2 != elements or 0 in (blocks, elements):
        raise ValueError("oft")
    if math.prod(own.get("scaled_oft", ())) != 1:
        raise ValueError("scaled_oft")
    return side, (0, blocks * side if blocks > 1 else 0)


def _loha(own: Mapping[str, Shape]) -> tuple[int, tuple[int, int]]:
    (rows, rank), (rank_b, columns) = own["hada_w1_a"], own["hada_w1_b"]
    if (own["hada_w2_a"], own["hada_w2_b"]) != ((rows, rank), (rank, columns)):
        raise ValueError("loha")
    if rank != rank_b or rank == 0:
        raise ValueError("loha")
    return rank, (rows, columns)


def _lokr(own: Mapping[str, Shape]) -> tuple[int, tuple[int, int]]:
    (rows1, columns1), rank1 = _factor("lokr_w1", own)
    (rows2, columns2), rank2 = _factor("lokr_w2", own)
    return max(rank1, rank2), (rows1 * rows2, columns1 * columns2)


_MEASURES = {
    "lora": _lora,
    "dora": _lora,
    "diff": _diff,
    "oft": _oft,
    "loha": _loha,
    "lokr": _lokr,
}


def _factor(part: str, own: Mapping[str, Shape]) -> tuple[tuple[int, int], int]:
    if part in own:
        rows, columns = own[part]
        return (rows, columns), 0
    (rows, rank), (same, columns) = own[f"{part}_a"], own[f"{part}_b"]
    if rank != same or rank == 0:
        raise ValueError(part)
    return (rows, columns), rank
