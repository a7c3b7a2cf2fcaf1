"""One forward of the transformer: stock, klein's, klein's in float8; power, clock, where it goes.

    python -m benchmarks.forward            # 9B geometry on a GPU, nano's on the CPU
    python -m benchmarks.forward --size 512 --seconds 5

Forwards run back to back for some seconds, since a chip that has reached its power limit is slower
than in a short burst; the median of the last two thirds counts. *pair* is both branches of guidance
in one batch, per forward. Weights are random, never zeros.
"""

import argparse
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.lora_switching import NAMES, transformer
from benchmarks.tiers import Case, teraflops
from klein.inference.acceleration import attention
from klein.inference.acceleration.transformer import FusedForward, quantise
from klein.models.catalog import MODELS, ModelSpec


def inputs(spec: ModelSpec, model: Any, size: int, texts: int, device: str) -> dict[str, Any]:
    """Random inputs of `texts` branches that share one picture of `size` pixels a side."""
    dtype, side = model.dtype, size // 16
    ids = torch.cartesian_prod(*(torch.arange(n) for n in (1, side, side, 1)))[None]
    length = spec.max_sequence_length
    words = torch.cartesian_prod(*(torch.arange(n) for n in (1, 1, 1, length)))[None]
    width = model.config.joint_attention_dim
    return {
        "hidden_states": torch.randn(1, side * side, 128, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(texts, length, width, device=device, dtype=dtype),
        "timestep": torch.full((1,), 0.5, device=device, dtype=dtype),
        "img_ids": ids.to(device),
        "txt_ids": words.to(device),
        "guidance": None,
        "return_dict": False,
    }


@contextmanager
def watched(device: str) -> Iterator[list[tuple[float, int, int]]]:
    """Watts, megahertz and the reasons for the clock, twenty times a second."""
    seen: list[tuple[float, int, int]] = []
    if device != "cuda":
        yield seen
        return
    import pynvml

    pynvml.nvmlInit()
    gpu = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.05):
            seen.append(
                (
                    pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
                    pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM),
                    pynvml.nvmlDeviceGetCurrentClocksEventReasons(gpu),
                )
            )

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def sustained(work: Callable[[], Any], seconds: float, device: str) -> float:
    """Milliseconds of one `work` after the chip has warmed to it."""

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    work()
    started = last = now()
    spent: list[float] = []
    while last - started < seconds or len(spent) < 3:
        work()
        spent.append(1000 * (now() - last))
        last = now()
    return statistics.median(spent[len(spent) // 3 :])


def row(name: str, work: Callable[[], Any], texts: int, work_done: float, args: Any) -> None:
    """Print what one way takes."""
    with watched(args.device) as seen:
        each = sustained(work, args.seconds, args.device) / texts
    line = f"{name:<16}{each:9.2f} ms a forward {work_done / each * 1000:7.4g} TFLOP/s"
    if late := seen[len(seen) // 3 :]:
        watts, clock = (statistics.mean(sample[i] for sample in late) for i in (0, 1))
        line += f" {watts:6.0f} W {clock:6.0f} MHz, reasons {late[-1][2]:#x}"
    print(line, flush=True)


def profile(name: str, work: Callable[[], Any]) -> None:
    """Print the kernels that one `work` spends its time in."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    work()
    with record(activities=[ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    spent = [(e.self_device_time_total / 1000, e.count, e.key) for e in seen.key_averages()]
    spent = sorted((each for each in spent if each[0] > 0), reverse=True)
    print(f"\n{name}: {sum(each[0] for each in spent):.1f} ms in")
    for milliseconds, count, kernel in spent[:12]:
        print(f"{milliseconds:9.3f} ms {count:4} × {kernel[:90]}")


@torch.inference_mode()
def main() -> None:
    """Print a line for each way, then profiles."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--geometry", choices=NAMES, default="9B" if device == "cuda" else "nano")
    parser.add_argument("--size", type=int, help="side in pixels; the native one unless given")
    parser.add_argument("--seconds", type=float, default=3.0)
    args = parser.parse_args()
    args.device = device
    spec = MODELS[NAMES[args.geometry]]
    size = args.size or spec.native_size
    model = transformer(spec, device, torch.bfloat16 if device == "cuda" else torch.float32)
    capability = torch.cuda.get_device_capability() if device == "cuda" else (0, 0)
    backend = attention.choose("auto", device, capability, fused=True)
    fused = FusedForward(model, backend.attend)
    one, pair = (inputs(spec, model, size, texts, device) for texts in (1, 2))
    done = teraflops(spec, Case(size, size, references=0))
    print(f"{spec.name} at {size}×{size}, {model.dtype}, {backend.label}")
    row("stock", lambda: model(**one), 1, done, args)
    row("klein", lambda: fused(**one), 1, done, args)
    row("klein, pair", lambda: fused(**pair), 2, done, args)
    if device == "cuda":
        profile("stock", lambda: model(**one))
        profile("klein, pair", lambda: fused(**pair))
    quantise(model, device)
    row("float8", lambda: fused(**one), 1, done, args)
    row("float8, pair", lambda: fused(**pair), 2, done, args)
    if device == "cuda":
        profile("float8, pair", lambda: fused(**pair))


if __name__ == "__main__":
    main()
