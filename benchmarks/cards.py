"""What base-9B does on smaller cards and from each kind of weights: decided, seconds, memory.

    python -m benchmarks.cards --folder /data/cards                 # a GPU, random 9B weights
    python -m benchmarks.cards --folder /tmp/cards --geometry nano  # on the CPU, no cards

Makes a random model in the folder, once (35 GB for the 9B), and packs it (21 GB more). The packed
transformer doubles as the float8 file. Then each row is a fresh process that starts as a server
does and draws with a LoRA on:

card     GB of the card it stands for: this process holds the rest of the memory, so that the plan
         and the allocator see no more; "all" is the whole card
weights  the bfloat16 folder, that with the float8 file in KLEIN_TRANSFORMER, the packed folder
start    seconds from the start of the process to the first image's beginning, with the page cache
         dropped (cold) and full (warm); imports, kernels and warm-up included
step     seconds a step with guidance at the sizes named, the second image of each
turbo    seconds of an image by the preset turbo_lora: 8 steps, no guidance
peak     the most GPU memory that the process had, its CUDA context included

Rows for which no time is left are left out. Random weights measure time and memory truly and say
nothing about images.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klein.models.catalog import GB

CARDS = {80: 84.0, 48: 50.0, 32: 33.6, 24: 25.0, 16: 16.6, 12: 12.3}
"""GB in a card's name → GB (1e9) that are free on it."""
SIZES = {"9B": ("1024x1024", "1024x1536"), "4B": ("1024x1024", "1024x1536"), "nano": ("256x256",)}
BUDGET = 540.0
"""Seconds for all rows."""
RANK = 32


@dataclass(frozen=True, slots=True)
class Case:
    """A row: which weights, in which tier, on which card (None: all of this one)."""

    weights: str
    speed: str
    card: int | None = None
    cold: bool = False


def cases(gpu: bool, cards: list[int]) -> Iterator[Case]:
    """The starts side by side first, then what each card does."""
    speeds = ("exact", "fast") if gpu else ("eager", "fast")
    for weights in ("folder", "float8 file", "packed"):
        for cold in (True, False):
            speed = speeds[0] if weights == "folder" else speeds[1]
            yield Case(weights, speed, cold=cold)
    yield Case("folder", speeds[1])
    for card in cards:
        yield Case("folder", "auto", card)
        yield Case("float8 file", "auto", card)
        yield Case("float8 file", "turbo", card)


# -- one row, in a process of its own -----------------------------------------------------------


def child(args: argparse.Namespace) -> dict[str, Any]:
    """Start as a server does, draw, and tell what came of it."""
    from klein.app.build import loader
    from klein.errors import KleinError
    from klein.models.machine import Machine
    from klein.models.plan import plan
    from klein.settings import Settings

    settings = Settings.from_env(os.environ)
    try:
        decided = plan(settings, Machine.probe(os.environ))
        pipe = loader(settings, os.environ)()
    except KleinError as error:
        return {"decided": "refused", "why": str(error)}
    row: dict[str, Any] = {
        "decided": f"{decided.acceleration.tier.name}, {decided.offload}",
        "start": time.time() - args.spawned,
    }
    for size in SIZES[args.geometry]:
        row[size] = _drawn(pipe, args, size)
    row["turbo"] = _drawn(pipe, args, SIZES[args.geometry][0], preset="turbo_lora")
    row["peak"] = _peak()
    return row


def _drawn(pipe: Any, args: argparse.Namespace, size: str, preset: str | None = None) -> float:
    """Seconds of the second of two images with a LoRA on: a step's, or with a preset the whole."""
    from benchmarks.lora_switching import lora
    from klein.core import Job, RequestContext
    from klein.errors import KleinError
    from klein.lora import file
    from klein.request.resolve import resolve
    from klein.request.schema import parse

    path = args.folder / f"turbo-{RANK}.safetensors"
    if not path.is_file():
        lora(pipe.parts.transformer, RANK, path, seed=1)
    width, height = map(int, size.split("x"))
    asked: dict[str, Any] = {"prompt": "a portrait", "seed": 1, "width": width, "height": height}
    asked |= {"preset": preset} if preset else {"num_inference_steps": args.steps}
    asked["loras"] = [{"path": path.name, "scale": 0.01}]
    params = resolve(parse(asked), pipe.info.spec, lambda: 1).params
    found = (file.inspect(path, path.name),)
    try:
        for _ in range(2):
            job = Job(RequestContext(math.inf), params, found)
            timings = pipe.generate(job).timings
    except KleinError as error:
        print(f"{size}: {error}", file=sys.stderr)
        return math.nan
    return float(timings.total if preset else timings.denoise / params.num_inference_steps)


def _peak() -> float:
    """GB of GPU memory at the most; 0 on the CPU."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    held = torch.cuda.memory_reserved()
    free, total = torch.cuda.mem_get_info()
    others = int(os.environ.get("BENCHMARK_HELD", "0"))
    context = total - free - held - others
    return (torch.cuda.max_memory_reserved() + context) / GB


# -- all rows -----------------------------------------------------------------------------------


@contextmanager
def card_of(gigabytes: int | None) -> Iterator[int]:
    """Hold so much of the GPU's memory that what is left is that of a card; yields the bytes that
    are in use then."""
    import torch

    if gigabytes is None:
        yield 0
        return
    torch.cuda.init()
    free, total = torch.cuda.mem_get_info()
    rest = free - int(CARDS[gigabytes] * GB)
    if rest < 0:
        raise SystemExit(f"this GPU has {free / GB:.1f} GB free: no {gigabytes} GB card fits in it")
    held = torch.empty(rest, dtype=torch.uint8, device="cuda")
    try:
        yield total - torch.cuda.mem_get_info()[0]
    finally:
        del held
        torch.cuda.empty_cache()


def spawn(args: argparse.Namespace, case: Case, held: int, left: float) -> dict[str, Any]:
    """What a process of its own says of the case."""
    packed = args.folder / "packed"
    environ = os.environ | {
        "MODEL_ID": str(packed if case.weights == "packed" else args.folder / "model"),
        "KLEIN_SPEED": case.speed,
        "HF_HUB_OFFLINE": "1",
        "BENCHMARK_HELD": str(held),
    }
    if case.weights == "float8 file":
        file = packed / "transformer" / "diffusion_pytorch_model.safetensors"
        environ["KLEIN_TRANSFORMER"] = str(file)
    command = [sys.executable, "-m", "benchmarks.cards", "--folder", str(args.folder)]
    command += ["--geometry", args.geometry, "--steps", str(args.steps)]
    command += ["--spawned", repr(time.time())]
    try:
        done = subprocess.run(
            command, env=environ, timeout=left, capture_output=True, text=True, check=False
        )
    except subprocess.TimeoutExpired:
        return {"decided": "out of time"}
    if done.returncode:
        return {"decided": "failed", "why": done.stderr[-1500:]}
    row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def prepare(args: argparse.Namespace, device: str) -> None:
    """The random model and the packed one, unless they are there."""
    from benchmarks.cold_start import make
    from klein.inference.pack import pack
    from klein.models.plan import locate_model
    from klein.settings import Settings

    model, packed = args.folder / "model", args.folder / "packed"
    if not (model / "model_index.json").is_file():
        make(model, args.geometry, device)
    if not packed.is_dir():
        started = time.monotonic()
        parts = pack(
            locate_model(Settings(model_id=str(model))), packed, float8=True, float8_text=True
        )
        size = sum(part.size for part in parts) / GB
        print(f"packed: {size:.1f} GB in {time.monotonic() - started:.0f} s", flush=True)


def show(args: argparse.Namespace, case: Case, row: dict[str, Any]) -> None:
    """One line of the table, and below it what went wrong."""
    numbers = [
        row.get(name, math.nan) for name in ("start", *SIZES[args.geometry], "turbo", "peak")
    ]
    cells = [
        f"{case.card} GB" if case.card else "all",
        f"{case.weights}{', cold' if case.cold else ''}",
        case.speed,
        row["decided"],
        *(f"{number:.2f}" for number in numbers),
    ]
    print("| " + " | ".join(cells) + " |", flush=True)
    if why := row.get("why"):
        print(f"    {why}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "cards")
    parser.add_argument("--geometry", choices=SIZES, default="9B")
    parser.add_argument("--cards", type=int, nargs="*", choices=CARDS, default=[24, 16, 12])
    parser.add_argument("--steps", type=int, default=8, help="of the images with guidance")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all rows")
    parser.add_argument("--spawned", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.spawned:
        print(json.dumps(child(args)))
        return
    import torch

    from benchmarks.cold_start import drop

    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    args.folder.mkdir(parents=True, exist_ok=True)
    prepare(args, device)
    until = time.monotonic() + args.budget
    head = ("card", "weights", "speed", "decided", "start", *SIZES[args.geometry], "turbo", "peak")
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head), flush=True)
    for case in cases(gpu, args.cards if gpu else []):
        if time.monotonic() > until:
            print("out of time: the rows below are left out", flush=True)
            return
        if case.cold:
            drop(args.folder, device)
        with card_of(case.card) as held:
            show(args, case, spawn(args, case, held, max(1.0, until - time.monotonic())))


if __name__ == "__main__":
    main()
