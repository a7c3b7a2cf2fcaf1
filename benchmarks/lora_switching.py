"""Ways to put a LoRA on the transformer, side by side: what a switch costs, and what a step costs.

    python -m benchmarks.lora_switching            # nano on the CPU, 9B geometry on a GPU
    python -m benchmarks.lora_switching --geometry 9B --ranks 32 128

Weights are random (never zeros): they measure time truly and say nothing about pictures. `merge`
is klein's own way, `adapter` plain PEFT layers, `hotswap` one padded slot of PEFT layers. What a
forward costs is taken against bare forwards before and after.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from safetensors.torch import load_file, save_file

from klein.inference.adapters.merge import AdapterRequest, LoraMerger
from klein.lora import file
from klein.models.catalog import MODELS, ModelSpec

HEADS = {"klein-base-9B": (32, 128), "klein-base-4B": (24, 128), "nano": (6, 32)}
NAMES = {"9B": "klein-base-9B", "4B": "klein-base-4B", "nano": "nano"}


def transformer(spec: ModelSpec, device: str, dtype: torch.dtype) -> Any:
    """A transformer of the model's geometry with random weights."""
    heads, dim = HEADS[spec.name]
    with torch.device(device):
        made = Flux2Transformer2DModel(
            num_layers=spec.double_blocks,
            num_single_layers=spec.single_blocks,
            num_attention_heads=heads,
            attention_head_dim=dim,
            joint_attention_dim=spec.hidden * 3 if heads > 6 else 192,
            axes_dims_rope=(dim // 4,) * 4,
            guidance_embeds=False,
        ).to(dtype)
    for weight in made.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.02)
    return made.eval()


def lora(model: Any, rank: int, path: Path, seed: int) -> Path:
    """A random LoRA of that rank on every block linear, in diffusers' format."""
    made = torch.Generator("cpu").manual_seed(seed)
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "transformer_blocks." in name:
            down = torch.randn(rank, module.in_features, generator=made) * 0.02
            up = torch.randn(module.out_features, rank, generator=made) * 0.02
            tensors[f"transformer.{name}.lora_A.weight"] = down.to(module.weight.dtype)
            tensors[f"transformer.{name}.lora_B.weight"] = up.to(module.weight.dtype)
    save_file(tensors, path, {"format": "pt"})
    return path


def clock(work: Callable[[], Any], times: int, device: str) -> float:
    """Median milliseconds of `work`."""
    spent = []
    for _ in range(times):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        spent.append(1000 * (time.perf_counter() - started))
    return statistics.median(spent)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def forward(model: Any, device: str, dtype: torch.dtype, spec: ModelSpec) -> Callable[[], Any]:
    """One forward at the model's native size."""
    side = spec.native_size // 16
    text = spec.max_sequence_length
    ids = torch.cartesian_prod(*(torch.arange(n) for n in (1, side, side, 1)))
    given = {
        "hidden_states": torch.randn(1, side * side, 128, device=device, dtype=dtype),
        "timestep": torch.full((1,), 0.5, device=device, dtype=dtype),
        "guidance": None,
        "encoder_hidden_states": torch.randn(
            1, text, model.config.joint_attention_dim, device=device, dtype=dtype
        ),
        "txt_ids": torch.zeros(1, text, 4, device=device),
        "img_ids": ids[None].to(device),
        "return_dict": False,
    }
    return lambda: model(**given)


@torch.inference_mode()
def merge(model: Any, spec: ModelSpec, paths: list[Path], step: Any, device: str) -> list[float]:
    """First use, second use, back to base, a step with the LoRA; milliseconds."""
    merger = LoraMerger(model, spec)
    a, b = (AdapterRequest(path.name, file.inspect(path, path.name), 0.8) for path in paths)
    first = clock(lambda: merger.apply([a]), 1, device)
    merger.apply([b])
    uses = []
    for one in (a, b, a, b, a):
        uses.append(clock(partial(merger.apply, [one]), 1, device))
    with_lora = clock(step, 10, device)
    back = clock(lambda: merger.apply([]), 1, device)
    return [first, statistics.median(uses), back, with_lora]


def adapter(model: Any, paths: list[Path], step: Any, device: str, slot: int = 0) -> list[float]:
    """The same with PEFT layers; with `slot` a padded slot of that rank is swapped in place."""
    if slot:
        model.enable_lora_hotswap(target_rank=slot)
    a, b = (load_file(path, device=device) for path in paths)

    def put(tensors: Any) -> None:
        if slot and model.peft_config:
            model.load_lora_adapter(
                dict(tensors), adapter_name="x", prefix="transformer", hotswap=True
            )
            return
        if getattr(model, "peft_config", None):
            model.delete_adapters("x")
        model.load_lora_adapter(dict(tensors), adapter_name="x", prefix="transformer")

    model.peft_config = getattr(model, "peft_config", {})
    first = clock(lambda: put(a), 1, device)
    uses = [clock(partial(put, one), 1, device) for one in (b, a, b, a)]
    with torch.inference_mode():
        with_lora = clock(step, 10, device)
    back = clock(model.unload_lora, 1, device)
    return [first, statistics.median(uses), back, with_lora]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--geometry", choices=NAMES, default="9B" if device == "cuda" else "nano")
    parser.add_argument("--ranks", type=int, nargs="+", default=[32, 128])
    args = parser.parse_args()
    spec = MODELS[NAMES[args.geometry]]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = transformer(spec, device, dtype)
    step = forward(model, device, dtype, spec)
    with torch.inference_mode():
        clock(step, 3, device)
        bare = clock(step, 10, device)
    print(f"{args.geometry} geometry on {device}, {dtype}; a bare forward: {bare:.1f} ms")
    print(f"{'way':<10}{'rank':>5}{'first':>9}{'second':>9}{'back':>9}{'forward':>9}{'costs':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for rank in args.ranks:
            paths = [lora(model, rank, Path(folder) / f"{rank}-{i}.safetensors", i) for i in (1, 2)]
            rows = {
                "merge": lambda paths=paths: merge(model, spec, paths, step, device),
                "adapter": lambda paths=paths: adapter(model, paths, step, device),
                "hotswap": lambda paths=paths: adapter(
                    model, paths, step, device, slot=max(args.ranks)
                ),
            }
            for way, run in rows.items():
                with torch.inference_mode():
                    before = clock(step, 5, device)
                figures = run()
                with torch.inference_mode():
                    bare = (before + clock(step, 5, device)) / 2
                numbers = "".join(f"{value:9.1f}" for value in figures)
                print(f"{way:<10}{rank:5}{numbers}{figures[-1] / bare - 1:8.1%}", flush=True)


if __name__ == "__main__":
    main()
