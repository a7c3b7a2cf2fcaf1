import asyncio
from typing import Any

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from klein.app.account import Account
from klein.app.generator import Generator
from klein.app.metrics import METRICS, Metric, Recorder
from klein.errors import LoraError
from tests.support import fakes


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def recorder(registry: CollectorRegistry) -> Recorder:
    def make(row: Metric) -> Any:
        kind = getattr(prometheus_client, row.kind)
        return kind(row.name, row.doc, row.labels, registry=registry, **row.options)

    return Recorder(make)


def test_a_request_is_counted(registry: CollectorRegistry, recorder: Recorder) -> None:
    """Images, steps, LoRAs, seconds by stage, and failures by their code."""
    pipeline = fakes.FakePipeline()
    generator = fakes.generator(pipeline)
    generator.recorder = recorder
    loras = [{"path": "a.safetensors"}, {"path": "missing"}]
    run(generator, num_images=2, num_inference_steps=3, loras=loras)
    pipeline.fail = LoraError("gone")
    with pytest.raises(LoraError):
        run(generator)
    with pytest.raises(Exception, match="too small"):
        run(generator, width=10)
    recorder.count(Account("1", error=asyncio.CancelledError()))
    recorder.count(Account("2", error=ZeroDivisionError()))
    generator.stop()
    told = generate_latest(registry).decode()
    for line in (
        'klein_requests_total{outcome="ok"} 1.0',
        'klein_requests_total{outcome="lora_failed"} 1.0',
        'klein_requests_total{outcome="invalid_request"} 1.0',
        'klein_requests_total{outcome="cancelled"} 1.0',
        'klein_requests_total{outcome="internal"} 1.0',
        'klein_images_total{outcome="ok",preset="realistic_character",speed="eager"} 2.0',
        'klein_images_total{outcome="lora_failed",preset="realistic_character",speed="eager"} 1.0',
        "klein_steps_total 6.0",
        "klein_loras_applied_total 1.0",
        "klein_loras_failed_total 1.0",
        'klein_stage_seconds_count{stage="denoise"} 1.0',
        "klein_queue_size 8.0",
        "klein_running 0.0",
    ):
        assert line in told.splitlines(), line


def test_the_queue_is_shown_while_it_waits(registry: CollectorRegistry, recorder: Recorder) -> None:
    """Not only when some request ends: scaling and alarms look at a queue that does not move."""
    pipeline = fakes.FakePipeline()
    generator = fakes.generator(pipeline)
    generator.recorder = recorder
    pipeline.gate.clear()
    first = generator.engine.submit(fakes.job())
    assert pipeline.started.wait(5)
    second = generator.engine.submit(fakes.job())
    told = generate_latest(registry).decode().splitlines()
    assert {"klein_running 1.0", "klein_queue_waiting 1.0"} <= set(told)
    pipeline.gate.set()
    first.result(5), second.result(5)
    generator.stop()


def test_every_metric_says_what_it_is() -> None:
    """Names are unique and begin with klein's."""
    names = [row.name for row in METRICS]
    assert len(set(names)) == len(names)
    assert all(name.startswith("klein_") for name in names)
    assert all(row.doc for row in METRICS)


def run(generator: Generator, **values: Any) -> None:
    asyncio.run(generator.run(fakes.request(**values), generator.context()))
