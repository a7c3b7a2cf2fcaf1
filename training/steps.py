"""What every training run needs: a step that replays as a CUDA graph, a schedule, checkpoints."""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import torch


def pick_device() -> torch.device:
    """The GPU when there is one."""
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """bfloat16 autocast on the GPU, nothing on the CPU."""
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16, cache_enabled=False)
    return contextlib.nullcontext()


def make_optimizer(parameters: list[torch.nn.Parameter]) -> torch.optim.AdamW:
    """AdamW whose learning rate is a tensor, so that a captured step sees it change."""
    device = parameters[0].device
    rate = torch.zeros((), device=device)
    fused = device.type == "cuda"
    return torch.optim.AdamW(
        parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=fused, capturable=fused
    )


@cache
def _shared() -> tuple[tuple[int, int], torch.cuda.Stream]:
    """Memory and warm-up stream of all graphs: they run one by one and keep only the loss."""
    return torch.cuda.graph_pool_handle(), torch.cuda.Stream()


class Step:
    """One training step: forward, backward, clip, AdamW; a CUDA graph where that works."""

    def __init__(
        self,
        loss: Callable[[], torch.Tensor],
        optimizer: torch.optim.AdamW,
        after: Callable[[], None],
    ) -> None:
        self.loss, self.optimizer, self.after = loss, optimizer, after
        self.parameters = optimizer.param_groups[0]["params"]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.value = torch.zeros(())
        if self.parameters[0].is_cuda:
            self._capture()

    def _eager(self) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.after()
        return loss.detach()

    def _capture(self) -> None:
        """Record the step with learning rate zero, so that warming up moves no weight."""
        for group in self.optimizer.param_groups:
            group["lr"].fill_(0)
        pool, side = _shared()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._eager()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        try:
            with torch.cuda.graph(graph, pool=pool):
                self.value = self._eager()
            self.graph = graph
        except RuntimeError as error:
            print("no CUDA graph, running eagerly:", str(error)[:300], flush=True)

    def __call__(self, rate: float) -> torch.Tensor:
        """Run the step at a learning rate; returns the loss (a tensor that is reused)."""
        for group in self.optimizer.param_groups:
            group["lr"].fill_(rate)
        if self.graph is None:
            self.value = self._eager()
        else:
            self.graph.replay()
        return self.value


def cosine(progress: float, peak: float, warmup: float = 0.02) -> float:
    """Learning rate at progress 0..1: linear warm-up, then cosine down to one hundredth."""
    if progress < warmup:
        return peak * progress / warmup
    rest = (progress - warmup) / (1 - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(rest, 1.0))))


class Clock:
    """Progress by time spent, kept across resumed runs."""

    def __init__(self, seconds: float, spent: float = 0.0, step: int = 0) -> None:
        self.seconds, self.spent, self.step = seconds, spent, step

    def ticks(self) -> Iterator[float]:
        """Yield progress 0..1 until the seconds are spent."""
        last = time.monotonic()
        while self.spent < self.seconds:
            yield self.spent / self.seconds
            now = time.monotonic()
            self.spent, last, self.step = self.spent + now - last, now, self.step + 1


def save_atomically(state: object, path: Path) -> None:
    """Write a checkpoint so that a reader never sees half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def report(name: str, clock: Clock, **values: float) -> None:
    """Print one line of figures."""
    figures = "  ".join(f"{key} {value:.4f}" for key, value in values.items())
    print(f"{name}  {clock.spent:6.1f} s  step {clock.step:6d}  {figures}", flush=True)
