import json
from pathlib import Path

import pytest

from klein.sources import safetensors
from klein.sources.safetensors import Damaged, Entry


def _file(tmp_path: Path, header: dict[str, object], data: bytes) -> Path:
    raw = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def test_what_a_header_says(tmp_path: Path) -> None:
    """Tensors in the order they lie, with places in the file; an empty one is one too."""
    header = {
        "__metadata__": {"a": "b"},
        "second": {"dtype": "F16", "shape": [2], "data_offsets": [4, 8]},
        "none": {"dtype": "I64", "shape": [0, 3], "data_offsets": [4, 4]},
        "first": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
    }
    path = _file(tmp_path, header, bytes(8))
    start = path.stat().st_size - 8
    with path.open("rb") as file:
        found = safetensors.read(file)
    assert found.entries == (
        Entry("first", "F32", (), start, start + 4),
        Entry("none", "I64", (0, 3), start + 4, start + 4),
        Entry("second", "F16", (2,), start + 4, start + 8),
    )
    assert (found.metadata, found.shapes["second"]) == ({"a": "b"}, (2,))


@pytest.mark.parametrize(
    ("spans", "size"),
    [([(0, 4), (8, 12)], 12), ([(0, 4), (0, 4)], 8), ([(0, 4)], 8), ([(0, 4)], 2)],
)
def test_tensors_fill_their_file(tmp_path: Path, spans: list[tuple[int, int]], size: int) -> None:
    """Without gaps, overlaps or a rest."""
    header: dict[str, object] = {
        str(i): {"dtype": "F32", "shape": [1], "data_offsets": span} for i, span in enumerate(spans)
    }
    path = _file(tmp_path, header, bytes(size))
    with path.open("rb") as file, pytest.raises(Damaged):
        safetensors.read(file)


def test_a_header_has_the_bound_it_is_read_with(tmp_path: Path) -> None:
    """A LoRA's is smaller than a model's."""
    path = _file(tmp_path, {"__metadata__": {"a": "x" * 1000}}, b"")
    with path.open("rb") as file:
        assert safetensors.read(file).entries == ()
        file.seek(0)
        with pytest.raises(Damaged, match="900 are the most"):
            safetensors.read(file, 900)
