"""What is measured, one row each: every way of telling it (Prometheus, JSON) follows the table."""

from collections.abc import Callable
from dataclasses import dataclass

from klein.app.generator import Generator
from klein.core import PipelineStats
from klein.engine.engine import State


@dataclass(frozen=True, slots=True)
class Gauge:
    """One value of now, read from the pipeline."""

    name: str
    doc: str
    read: Callable[[PipelineStats], float]


GAUGES = (
    Gauge(
        "klein_kernels_compiled",
        "GPU kernels made ready since the start; it grows while klein warms up and not after",
        lambda stats: stats.kernels_compiled,
    ),
)


def read(generator: Generator) -> dict[str, float]:
    """The value of each gauge; nothing while the model loads."""
    if generator.engine.state is not State.READY:
        return {}
    stats = generator.engine.pipeline.stats()
    return {row.name: row.read(stats) for row in GAUGES}
