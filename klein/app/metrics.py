"""What is measured: one row for each metric, and the one place that fills them.

The classes are prometheus_client's or BentoML's, which are the same over files that its workers
share: whoever serves `/metrics` says how a row becomes a metric.
"""

import asyncio
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from klein.core import GenerationResult
from klein.engine.engine import Engine, State
from klein.errors import ErrorCode, KleinError

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
                return {"multiprocess_mode": "livemax"}
            case "Histogram":
                return {"buckets": SECONDS}
            case "Counter":
                return {}


METRICS = (
    Metric(
        "Counter", "klein_requests", "requests by outcome: `ok` or an error's code", ("outcome",)
    ),
    Metric("Counter", "klein_images", "images drawn", ("preset", "speed")),
    Metric("Counter", "klein_steps", "denoising steps drawn"),
    Metric("Counter", "klein_forwards", "transformer forwards run"),
    Metric("Counter", "klein_loras_applied", "LoRAs put on"),
    Metric("Counter", "klein_loras_failed", "LoRAs that images were drawn without"),
    Metric("Histogram", "klein_stage_seconds", "seconds of a request by stage", ("stage",)),
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


class Recorder:
    """Fills the metrics of one generator."""

    def __init__(self, make: Callable[[Metric], Any]) -> None:
        self._metrics = {row.name: make(row) for row in METRICS}

    def finished(self, result: GenerationResult) -> None:
        """Count a request that was drawn."""
        params, count = result.params, len(result.images)
        self._metrics["klein_requests"].labels(outcome="ok").inc()
        self._metrics["klein_images"].labels(params.preset, result.model.speed).inc(count)
        self._metrics["klein_steps"].inc(params.num_inference_steps * count)
        self._metrics["klein_forwards"].inc(result.forwards)
        applied = sum(report.applied for report in result.loras)
        self._metrics["klein_loras_applied"].inc(applied)
        self._metrics["klein_loras_failed"].inc(len(result.loras) - applied)
        for stage, seconds in asdict(result.timings).items():
            self._metrics["klein_stage_seconds"].labels(stage=stage).observe(seconds)

    def failed(self, error: BaseException) -> None:
        """Count a request that was not: by its error's code, `cancelled` if its caller left."""
        code = ErrorCode.INTERNAL
        if isinstance(error, KleinError):
            code = error.code
        elif isinstance(error, asyncio.CancelledError):
            code = ErrorCode.CANCELLED
        self._metrics["klein_requests"].labels(outcome=str(code)).inc()

    def update(self, engine: Engine) -> None:
        """Set the gauges to what is so now."""
        queue = engine.stats()
        values: dict[str, float | None] = {
            "klein_queue_waiting": queue.waiting,
            "klein_queue_size": queue.queue_size,
            "klein_running": queue.running,
        }
        if engine.state is State.READY:
            pipeline = engine.pipeline.stats()
            values["klein_kernels_compiled"] = pipeline.kernels_compiled
            values["klein_gpu_memory_free_bytes"] = pipeline.gpu_memory_free
            values["klein_gpu_memory_bytes"] = pipeline.gpu_memory_total
        for name, value in values.items():
            if value is not None:
                self._metrics[name].set(value)
