"""Makes LoRA files in every trainer's way, with the ΔW each of them means. No torch needed."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
_DTYPES = {"float32": "F32", "float16": "F16"}


def write(
    path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None
) -> Path:
    """A .safetensors file, written by hand so that tests need no library to make one."""
    header: dict[str, object] = {"__metadata__": dict(metadata or {"format": "pt"})}
    data = b""
    for name, array in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": _DTYPES[str(array.dtype)],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    blob = json.dumps(header).encode()
    path.write_bytes(len(blob).to_bytes(8, "little") + blob + data)
    return path


def layers(hidden: int, double: int = 2, single: int = 2) -> dict[str, tuple[int, int]]:
    """(out, in) of every block layer of a FLUX.2 transformer, by Black Forest Labs' names."""
    shapes = {}
    for block in range(double):
        for stream in ("img", "txt"):
            name = f"double_blocks.{block}.{stream}"
            shapes[f"{name}_attn.qkv"] = (3 * hidden, hidden)
            shapes[f"{name}_attn.proj"] = (hidden, hidden)
            shapes[f"{name}_mlp.0"] = (6 * hidden, hidden)
            shapes[f"{name}_mlp.2"] = (hidden, 3 * hidden)
    for block in range(single):
        shapes[f"single_blocks.{block}.linear1"] = (9 * hidden, hidden)
        shapes[f"single_blocks.{block}.linear2"] = (hidden, 4 * hidden)
    return shapes


def random(shape: tuple[int, ...], seed: int, scale: float = 0.3) -> Array:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def ai_toolkit(
    shapes: Mapping[str, tuple[int, int]], rank: int = 4, seed: int = 0, trigger: str = ""
) -> tuple[dict[str, Array], dict[str, str]]:
    """Tensors and metadata as ai-toolkit saves them: no alpha, `diffusion_model.` in front."""
    tensors = {}
    for number, (layer, (rows, columns)) in enumerate(shapes.items()):
        name = f"diffusion_model.{layer}"
        tensors[f"{name}.lora_A.weight"] = random((rank, columns), seed + 2 * number)
        tensors[f"{name}.lora_B.weight"] = random((rows, rank), seed + 2 * number + 1)
    tags = {"ss_tag_frequency": json.dumps({f"1_{trigger}": {trigger: 1}})} if trigger else {}
    return tensors, {"format": "pt", **tags}
