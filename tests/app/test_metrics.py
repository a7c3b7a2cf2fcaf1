import asyncio
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from klein.app.account import Account, outcome_of
from klein.app.generator import Generator
from klein.app.jobs import JobRegistry
from klein.app.metrics import METRICS, Metric, Recorder
from klein.core import PipelineStats
from klein.errors import LoraError
from klein.sources.cache import StoreStats
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
    recorder.count(Account("1", outcome=outcome_of(asyncio.CancelledError())))
    recorder.count(Account("2", outcome=outcome_of(ZeroDivisionError())))
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


def test_counts_kept_elsewhere_are_brought_up_to_date(
    registry: CollectorRegistry, recorder: Recorder
) -> None:
    """Those of the pipeline and the store by what came since; streams while they are open."""
    pipeline, library = fakes.FakePipeline(), fakes.FakeLibrary()
    generator = fakes.generator(pipeline, library)
    store, stats = StoreStats(hits=2, fetches=1, bytes=70), PipelineStats("", 0, 1, 5, 10, 40)
    library.store_stats = lambda: store  # type: ignore[method-assign]
    pipeline.stats = lambda: stats  # type: ignore[method-assign]
    for _ in range(2):
        recorder.update(generator.engine, library)
    store, stats = replace(store, hits=3, bytes=10), replace(stats, lora_switches=6)
    recorder.update(generator.engine, library)
    recorder.received("lora")(1000)
    generator.recorder = recorder
    registry_of = JobRegistry(generator)
    with registry_of.stream(None), generator.streaming():
        told = set(generate_latest(registry).decode().splitlines())
    assert "klein_event_streams 2.0" in told
    generator.stop()
    recorder.update(generator.engine, library)
    told |= set(generate_latest(registry).decode().splitlines())
    assert told >= {
        "klein_lora_cache_hits_total 3.0",
        "klein_lora_cache_fetches_total 1.0",
        "klein_lora_cache_bytes 10.0",
        "klein_lora_switches_total 6.0",
        "klein_memory_retries_total 1.0",
        "klein_gpu_memory_free_bytes 10.0",
        'klein_fetched_bytes_total{kind="lora"} 1000.0',
        "klein_event_streams 0.0",
        "klein_ready 1.0",
        "klein_ready 0.0",
    }


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


WORKER = """
import os, prometheus_client
from klein.app.account import Account
from klein.app.metrics import Recorder
recorder = Recorder(
    lambda row: getattr(prometheus_client, row.kind)(row.name, row.doc, row.labels, **row.options)
)
recorder.count(Account("1"))
if os.environ["DIES"]:
    stream = recorder.stream()
    stream.__enter__()
os._exit(9)
"""


def test_workers_share_their_counts(tmp_path: Path) -> None:
    """As BentoML's do, over files: counts add up, gauges are those of the newest worker, whatever
    one that was killed had left in them."""
    for dies in ("yes", ""):
        env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "DIES": dies}
        subprocess.run([sys.executable, "-c", WORKER], env=env, check=False)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(tmp_path))
    told = set(generate_latest(registry).decode().splitlines())
    assert {'klein_requests_total{outcome="ok"} 2.0', "klein_event_streams 0.0"} <= told
    assert 'klein_requests_total{outcome="internal"} 0.0' in told


def test_every_metric_says_what_it_is() -> None:
    """Names are unique and begin with klein's."""
    names = [row.name for row in METRICS]
    assert len(set(names)) == len(names)
    assert all(name.startswith("klein_") for name in names)
    assert all(row.doc for row in METRICS)


def run(generator: Generator, **values: Any) -> None:
    asyncio.run(generator.run(fakes.request(**values), generator.context()))
