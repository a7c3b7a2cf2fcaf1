"""How long a start takes from the first instruction to weights on the device, and where it goes.

    python -m benchmarks.cold_start --folder /data/random-9B
    python -m benchmarks.cold_start --folder /tmp/nano --geometry nano     # on the CPU, seconds

Makes a random model of that geometry in the folder, once (35 GB for the 9B), then loads it in fresh
processes, each with the page cache dropped (cold) and with it full (warm):

raw      16 threads read the bytes that klein needs into page-locked memory, and nothing else
direct   the same past the page cache (O_DIRECT); cold only
library  from_pretrained onto the device, with parallel loading
klein    klein.loading
early    the same, and from the first moment until the imports are done threads read ahead into the
         page cache

`total` counts from the start of the process, imports and the CUDA context included; GB/s and the
ratio to raw are those of the three parts alone. Bytes are those that klein needs, in every row.
Rows for which no time is left are left out.
"""

import argparse
import hashlib
import json
import mmap
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

PARTS = ("text_encoder", "transformer", "vae")
STEMS = {"text_encoder": "model"}
VARIANTS = ("raw", "klein", "library", "early", "direct")
LAYERS = 27
CHUNK = 32 * 1024**2
PAGE = 4096
RAW_THREADS = 16
BUDGET = 340.0
"""Seconds for everything, making the model included."""

Span = tuple[Path, int, int]
"""Bytes from and to in a file."""


# -- the model ---------------------------------------------------------------------------------


def empty_parts(geometry: str) -> dict[str, Any]:
    """The three models on the meta device, in bfloat16."""
    import torch
    from diffusers import AutoencoderKLFlux2
    from transformers import AutoConfig, Qwen3Config, Qwen3ForCausalLM

    from benchmarks.lora_switching import NAMES, transformer
    from klein.models.catalog import MODELS

    nano = nano_folder()
    if geometry == "nano":
        text: Any = AutoConfig.from_pretrained(nano, subfolder="text_encoder")
        image = AutoencoderKLFlux2.load_config(nano / "vae")
    else:
        text, image = qwen3_8b(Qwen3Config), {}
    with torch.device("meta"):
        return {
            "text_encoder": Qwen3ForCausalLM(text).to(torch.bfloat16),
            "transformer": transformer(MODELS[NAMES[geometry]], "meta", torch.bfloat16),
            "vae": AutoencoderKLFlux2.from_config(image).to(torch.bfloat16),
        }


def qwen3_8b(config: Callable[..., Any]) -> Any:
    """The configuration of Qwen3-8B."""
    return config(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000},
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def nano_folder() -> Path:
    return Path(__file__).parent.parent / "klein" / "nano" / "model"


def make(folder: Path, geometry: str, device: str) -> None:
    """Write the model as a diffusers folder; model_index.json comes last and means it is whole."""
    started = time.monotonic()
    models = empty_parts(geometry)
    size = sum(x.nbytes for model in models.values() for x in model.state_dict().values())
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < size * 1.02:
        sys.exit(f"the model needs {size / 1e9:.1f} GB and {free / 1e9:.1f} are free in {folder}")
    for part, model in models.items():
        if hasattr(model, "save_config"):
            model.save_config(folder / part)
        else:
            model.config.save_pretrained(folder / part)
        limit = 5_000_000_000 if geometry != "nano" else 2_000_000
        save_weights(
            folder / part, STEMS.get(part, "diffusion_pytorch_model"), model, limit, device
        )
    for part in ("scheduler", "tokenizer"):
        shutil.copytree(nano_folder() / part, folder / part, dirs_exist_ok=True)
    os.sync()
    shutil.copy(nano_folder() / "model_index.json", folder)
    spent = time.monotonic() - started
    print(f"made {size / 1e9:.2f} GB in {spent:.1f} s: {size / spent / 1e9:.2f} GB/s", flush=True)


def save_weights(folder: Path, stem: str, model: Any, limit: int, device: str) -> None:
    """Random weights in shards of up to `limit` bytes, three of them at a time."""
    state = model.state_dict()
    if getattr(model.config, "tie_word_embeddings", False):
        state.pop("lm_head.weight")
    shards: list[list[str]] = [[]]
    room = limit
    for name, tensor in state.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= tensor.nbytes
    names = [f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    with ThreadPoolExecutor(3) as pool:
        for _ in pool.map(lambda x, to: save_shard(state, x, folder / to, device), shards, names):
            pass
    if len(shards) > 1:
        where = {name: to for to, shard in zip(names, shards, strict=True) for name in shard}
        (folder / f"{stem}.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": where})
        )


def save_shard(state: dict[str, Any], names: list[str], path: Path, device: str) -> None:
    from safetensors.torch import save_file

    save_file({name: values(state[name], device) for name in names}, path, {"format": "pt"})


def values(like: Any, device: str) -> Any:
    """Random numbers of that shape and type, drawn on the device: small, or about 1 for vectors."""
    import torch

    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype)
    drawn = torch.randn(like.shape, dtype=like.dtype, device=device)
    return drawn.mul_(0.02).add_(0 if like.dim() > 1 else 1).cpu()


# -- one variant, in a process of its own ------------------------------------------------------


class Laps:
    """Seconds by stage since `started`, a time of the system-wide monotonic clock."""

    def __init__(self, started: float) -> None:
        self.started = self.last = started
        self.seconds: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage] = now - self.last
        self.seconds["total"] = now - self.started
        self.last = now


def cut_config(folder: Path) -> Any:
    """The text encoder's configuration, cut as klein does."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, subfolder="text_encoder")
    config.num_hidden_layers = min(config.num_hidden_layers, LAYERS)
    config.layer_types = config.layer_types[: config.num_hidden_layers]
    return config


def run_library(folder: Path, device: str, laps: Laps, _: int) -> dict[str, Any]:
    import torch
    from diffusers import (  # noqa: F401
        AutoencoderKLFlux2,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import Qwen3ForCausalLM

    torch.empty(1, device=device)
    laps.lap("imports")
    where = {"device_map": device, "use_safetensors": True, "local_files_only": True}
    text = Qwen3ForCausalLM.from_pretrained(
        folder / "text_encoder", config=cut_config(folder), dtype=torch.bfloat16, **where
    )
    text.model.norm = torch.nn.Identity()
    text.lm_head = torch.nn.Identity()
    finish(laps, "text_encoder", device)
    kinds = {"transformer": Flux2Transformer2DModel, "vae": AutoencoderKLFlux2}
    made: dict[str, Any] = {"text_encoder": text}
    for part, kind in kinds.items():
        made[part] = kind.from_pretrained(folder / part, torch_dtype=torch.bfloat16, **where)
        finish(laps, part, device)
    return made


def run_klein(folder: Path, device: str, laps: Laps, threads: int) -> dict[str, Any]:
    import torch
    from diffusers import (  # noqa: F401
        AutoencoderKLFlux2,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import AutoModelForCausalLM, Qwen3ForCausalLM  # noqa: F401

    from klein.inference.loading import modules as loading
    from klein.inference.loading import reader

    reader.THREADS, reader.BUFFERS = threads, threads + 4
    torch.empty(1, device=device)
    laps.lap("imports")
    made = {}
    for part in PARTS:
        if part == "text_encoder":
            made[part] = loading.text_encoder(
                folder / part, cut_config(folder), device, torch.bfloat16
            )
        else:
            made[part] = getattr(loading, part)(folder / part, device, torch.bfloat16)
        finish(laps, part, device)
    return made


def run_early(folder: Path, device: str, laps: Laps, threads: int) -> dict[str, Any]:
    chunks = [chunk for part in PARTS for chunk in chunked(spans(folder / part))]
    buffers = [memoryview(mmap.mmap(-1, CHUNK)) for _ in range(threads)]
    go_on = lambda: "imports" not in laps.seconds  # noqa: E731
    ahead = threading.Thread(target=read_spans, args=(chunks, buffers, 0, go_on), daemon=True)
    ahead.start()
    return run_klein(folder, device, laps, threads)


def finish(laps: Laps, stage: str, device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    laps.lap(stage)


def run_raw(folder: Path, device: str, laps: Laps, _: int = 0, flags: int = 0) -> dict[str, Any]:
    """Reads, and reads only: what the disk and the page cache allow."""
    if device == "cuda":
        import torch

        made = [
            torch.empty(CHUNK + 2 * PAGE, dtype=torch.uint8, pin_memory=True)
            for _ in range(RAW_THREADS)
        ]
        buffers = [x.numpy().data for x in made]
    else:
        buffers = [memoryview(mmap.mmap(-1, CHUNK + 2 * PAGE)) for _ in range(RAW_THREADS)]
    laps.lap("imports")
    for part in PARTS:
        read_spans(list(chunked(spans(folder / part))), buffers, flags)
        laps.lap(part)
    return {}


def read_spans(
    chunks: list[Span],
    buffers: list[Any],
    flags: int = 0,
    go_on: Callable[[], bool] = lambda: True,
) -> None:
    """Read `chunks` into `buffers`, as many at a time as there are, while `go_on` says so."""
    opened = {path: os.open(path, os.O_RDONLY | flags) for path, _, _ in chunks}
    free: SimpleQueue[Any] = SimpleQueue()
    for buffer in buffers:
        free.put(buffer)

    def one(chunk: Span) -> None:
        path, begin, end = chunk
        if flags:
            begin, end = begin // PAGE * PAGE, -(-end // PAGE) * PAGE
        buffer = free.get()
        while begin < end and go_on():
            got = os.preadv(opened[path], [buffer[: end - begin]], begin)
            at_the_end = not got or (flags and got % PAGE)
            begin = end if at_the_end else begin + got
        free.put(buffer)

    with ThreadPoolExecutor(len(buffers)) as pool:
        for _ in pool.map(one, chunks):
            pass
    for descriptor in opened.values():
        os.close(descriptor)


def spans(folder: Path) -> Iterator[Span]:
    """Where the tensors lie that klein needs, neighbours as one, from the files' own headers."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            table = json.loads(file.read(length))
        table.pop("__metadata__", None)
        rows = sorted(row["data_offsets"] for name, row in table.items() if needed(name))
        begin = end = 0
        for first, last in rows:
            if first != end:
                if end > begin:
                    yield path, 8 + length + begin, 8 + length + end
                begin = first
            end = last
        if end > begin:
            yield path, 8 + length + begin, 8 + length + end


def needed(name: str) -> bool:
    """Whether klein needs the tensor: the text encoder's end it does not."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer:
        return int(layer[1]) < LAYERS
    return not name.startswith(("lm_head.", "model.norm."))


def chunked(whole: Iterable[Span]) -> Iterator[Span]:
    for path, begin, end in whole:
        for first in range(begin, end, CHUNK):
            yield path, first, min(first + CHUNK, end)


def digest(models: dict[str, Any]) -> str:
    """The same for the same names, types, shapes and bits, in and out of place; on the device."""
    import torch

    found = hashlib.sha256()
    for part in sorted(models):
        held = dict(models[part].named_parameters()) | dict(models[part].named_buffers())
        for name in sorted(held):
            flat = held[name].detach().contiguous().view(-1).view(torch.uint8)
            sums = [int(flat[i::step].sum()) for i, step in ((0, 1), (0, 2), (1, 3), (2, 7))]
            found.update(f"{part}.{name} {held[name].dtype} {held[name].shape} {sums}".encode())
    return found.hexdigest()[:12] if models else ""


RUNS: dict[str, Callable[[Path, str, Laps, int], dict[str, Any]]] = {
    "raw": run_raw,
    "direct": partial(run_raw, flags=os.O_DIRECT),
    "library": run_library,
    "klein": run_klein,
    "early": run_early,
}


def child(args: argparse.Namespace) -> None:
    """Run one variant and print what it took as JSON, on the last line."""
    if args.child == "make":
        make(args.folder, args.geometry, args.device)
        return
    laps = Laps(args.spawned)
    models = RUNS[args.child](args.folder, args.device, laps, args.threads[0])
    print(json.dumps({**laps.seconds, "digest": digest(models)}))


# -- all of them -------------------------------------------------------------------------------


def spawn(args: argparse.Namespace, variant: str, threads: int, left: float) -> str | None:
    """The last line that a process of its own printed, or None if it failed or took too long."""
    command = [sys.executable, "-m", "benchmarks.cold_start", "--folder", str(args.folder)]
    command += ["--geometry", args.geometry, "--device", args.device, "--child", variant]
    command += ["--threads", str(threads), "--spawned", repr(time.monotonic())]
    environ = os.environ | {"HF_ENABLE_PARALLEL_LOADING": "YES", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            command, env=environ, timeout=max(left, 1), capture_output=True, text=True
        )
    except subprocess.TimeoutExpired:
        print(f"{variant}: out of time", flush=True)
        return None
    if done.returncode:
        print(f"{variant} failed:\n{done.stderr[-2000:]}", flush=True)
        return None
    return (done.stdout.strip().splitlines() or [""])[-1]


def drop(folder: Path, device: str) -> str:
    """Empty the page cache: all of it as root on a GPU machine, else of the model's files."""
    os.sync()
    if os.geteuid() == 0 and device == "cuda":
        try:
            Path("/proc/sys/vm/drop_caches").write_text("3")
            return "all caches dropped (drop_caches), Python's own files included"
        except OSError:
            pass
    for path in folder.rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return "the model's files dropped from the page cache (fadvise)"


Row = tuple[str, str, dict[str, Any]]


def measure(args: argparse.Namespace, until: float) -> list[Row]:
    """Every variant cold and then warm, in the order asked for."""
    rows: list[Row] = []
    for variant in args.only:
        for threads in args.threads if variant == "klein" else args.threads[:1]:
            print(f"{variant}: {drop(args.folder, args.device)}", flush=True)
            for cache in ("cold", "warm")[: 1 if variant == "direct" else 2]:
                line = spawn(args, variant, threads, until - time.monotonic())
                if line is None:
                    break
                print(f"{variant} {cache} {line}", flush=True)
                name = f"{variant} ×{threads}" if variant in ("klein", "early") else variant
                rows.append((name, cache, json.loads(line)))
    return rows


def show(rows: list[Row], size: int) -> None:
    """Print the table."""
    raw = {cache: reading(row) for name, cache, row in reversed(rows) if name == "raw"}
    digests = [row["digest"] for _, _, row in rows if row["digest"]]
    same = "the same weights" if len(set(digests)) < 2 else "DIFFERENT WEIGHTS"
    print(f"\n{size / 1e9:.2f} GB needed; {len(digests)} loads gave {same}")
    stages = ("imports", *PARTS, "total")
    print(f"{'variant':<12}{'cache':<6}" + "".join(f"{x:>14}" for x in (*stages, "GB/s", "×raw")))
    for name, cache, row in rows:
        seconds = "".join(f"{row[stage]:14.2f}" for stage in stages)
        rate = size / reading(row) / 1e9
        ratio = f"{reading(row) / raw[cache]:14.2f}" if cache in raw else f"{'–':>14}"
        print(f"{name:<12}{cache:<6}{seconds}{rate:14.2f}{ratio}")


def reading(row: dict[str, Any]) -> float:
    return float(sum(row[part] for part in PARTS))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True, help="on a disk with 36 GB free")
    parser.add_argument("--geometry", choices=("9B", "nano"), default="9B")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--threads", type=int, nargs="+", default=[8], help="klein, each in turn")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cuda, and cpu for nano")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--spawned", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.device = args.device or ("cpu" if args.geometry == "nano" else "cuda")
    return args


def main() -> None:
    """Make the model if it is not there, measure, print the table."""
    args = parse()
    if args.child:
        child(args)
        return
    until = time.monotonic() + BUDGET
    if (args.folder / "model_index.json").is_file():
        print(f"{args.folder} is there already")
    elif (line := spawn(args, "make", 1, until - time.monotonic())) is None:
        sys.exit(1)
    else:
        print(line, flush=True)
    rows = measure(args, until)
    show(rows, sum(end - begin for part in PARTS for _, begin, end in spans(args.folder / part)))


if __name__ == "__main__":
    main()
