"""What is measured: one row for each metric, and the one place that fills them.

The classes are prometheus_client's or BentoML's, which are the same over files that its workers
share: whoever serves `/metrics` says how a row becomes a metric.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from klein.app.account import OUTCOMES, Account
from klein.core import GenerationResult
from klein.engine.engine import Engine, State
from klein.sources.cache import StoreStats

SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One row."""

    kind: Literal["Counter", "Gauge", "Histogram"]
    name: str
    doc: str
    labels: tuple[str, ...] = ()

    @property
    def options(self) -> dict[str, Any]:
        """What the class wants besides name, doc and labels."""
        match self.kind:
            case "Gauge":
                return {"multiprocess_mode": "livemostrecent"}
            case "Histogram":
                return {"buckets": SECONDS}
            case "Counter":
                return {}


METRICS = (
    Metric(
        "Counter", "klein_requests", "requests by outcome: `ok` or an error's code", ("outcome",)
    ),
    Metric(
        "Counter",
        "klein_images",
        "images asked for, by how their request ended: `ok` or an error's code",
        ("preset", "speed", "outcome"),
    ),
    Metric("Counter", "klein_steps", "denoising steps drawn"),
    Metric("Counter", "klein_forwards", "transformer forwards run"),
    Metric("Counter", "klein_loras_applied", "LoRAs put on"),
    Metric("Counter", "klein_loras_failed", "LoRAs that images were drawn without"),
    Metric("Counter", "klein_lora_switches", "changes of the LoRAs in the weights"),
    Metric("Counter", "klein_lora_cache_hits", "fetched LoRAs that were on disk when asked for"),
    Metric("Counter", "klein_lora_cache_fetches", "LoRAs that had to be fetched"),
    Metric("Gauge", "klein_lora_cache_bytes", "bytes of fetched LoRAs on disk"),
    Metric("Counter", "klein_fetched_bytes", "bytes received: `lora` or `image`", ("kind",)),
    Metric(
        "Counter",
        "klein_memory_retries",
        "jobs that ran out of GPU memory and were drawn again with less",
    ),
    Metric("Histogram", "klein_stage_seconds", "seconds of a request by stage", ("stage",)),
    Metric("Gauge", "klein_event_streams", "event streams that are open"),
    Metric("Gauge", "klein_ready", "1 while jobs are taken, 0 while loading and when unhealthy"),
    Metric("Gauge", "klein_queue_waiting", "jobs that wait for the GPU"),
    Metric("Gauge", "klein_queue_size", "jobs that may wait"),
    Metric("Gauge", "klein_running", "1 while a job runs"),
    Metric(
        "Gauge",
        "klein_kernels_compiled",
        "GPU kernels made ready since the start; it grows while klein warms up and not after",
    ),
    Metric("Gauge", "klein_gpu_memory_free_bytes", "free GPU memory"),
    Metric("Gauge", "klein_gpu_memory_bytes", "GPU memory in all"),
)


Fetched = Literal["lora", "image"]
FETCHED: tuple[Fetched, ...] = ("lora", "image")


class Store(Protocol):
    """Whoever knows of a store of fetched files."""

    def store_stats(self) -> StoreStats | None:
        """What it did so far, if there is one."""
        ...


class Recorder:
    """Fills the metrics of one generator.

    A label is a word of klein's own, never a caller's. What can be listed counts from 0, so that a
    rate sees the first of them.
    """

    def __init__(self, make: Callable[[Metric], Any]) -> None:
        self._metrics = {row.name: make(row) for row in METRICS}
        self._counted: dict[str, int] = {}
        self._streams = 0
        self._lock = threading.Lock()
        self._add_streams(0)
        for outcome in OUTCOMES:
            self._metrics["klein_requests"].labels(outcome)
        for kind in FETCHED:
            self._metrics["klein_fetched_bytes"].labels(kind)

    def count(self, ended: Account) -> None:
        """Count a request that is over."""
        self._metrics["klein_requests"].labels(ended.outcome).inc()
        if params := ended.params:
            images = self._metrics["klein_images"]
            images.labels(params.preset, ended.speed, ended.outcome).inc(params.num_images)
        if ended.result is not None:
            self._count_drawn(ended.result)

    def _count_drawn(self, result: GenerationResult) -> None:
        steps = result.params.num_inference_steps * len(result.images)
        self._metrics["klein_steps"].inc(steps)
        self._metrics["klein_forwards"].inc(result.forwards)
        applied = sum(report.applied for report in result.loras)
        self._metrics["klein_loras_applied"].inc(applied)
        self._metrics["klein_loras_failed"].inc(len(result.loras) - applied)
        for stage, seconds in asdict(result.timings).items():
            self._metrics["klein_stage_seconds"].labels(stage).observe(seconds)

    def received(self, kind: Fetched) -> Callable[[int], None]:
        """What counts the bytes of fetched LoRAs or pictures."""
        count: Callable[[int], None] = self._metrics["klein_fetched_bytes"].labels(kind).inc
        return count

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Count an event stream while it is open."""
        self._add_streams(1)
        try:
            yield
        finally:
            self._add_streams(-1)

    def _add_streams(self, change: int) -> None:
        with self._lock:
            self._streams += change
            self._metrics["klein_event_streams"].set(self._streams)

    def update(self, engine: Engine, library: Store) -> None:
        """Set the gauges to what is so now, and bring the counts of others up to date."""
        queue, store = engine.stats(), library.store_stats()
        values: dict[str, float | None] = {
            "klein_queue_waiting": queue.waiting,
            "klein_queue_size": queue.queue_size,
            "klein_running": queue.running,
            "klein_ready": engine.state is State.READY,
        }
        counts: dict[str, int] = {}
        if store is not None:
            values["klein_lora_cache_bytes"] = store.bytes
            counts["klein_lora_cache_hits"] = store.hits
            counts["klein_lora_cache_fetches"] = store.fetches
        if engine.state is State.READY:
            pipeline = engine.pipeline.stats()
            values["klein_kernels_compiled"] = pipeline.kernels_compiled
            values["klein_gpu_memory_free_bytes"] = pipeline.gpu_memory_free
            values["klein_gpu_memory_bytes"] = pipeline.gpu_memory_total
            counts["klein_memory_retries"] = pipeline.memory_retries
            counts["klein_lora_switches"] = pipeline.lora_switches
        for name, value in values.items():
            if value is not None:
                self._metrics[name].set(value)
        self._raise_to(counts)

    def _raise_to(self, counts: dict[str, int]) -> None:
        """Add to counters what counts kept elsewhere grew by since they were looked at last."""
        with self._lock:
            for name, count in counts.items():
                self._metrics[name].inc(max(0, count - self._counted.get(name, 0)))
                self._counted[name] = count
