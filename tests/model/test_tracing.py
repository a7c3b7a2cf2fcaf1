"""Traces of the real pipeline."""

import asyncio
from itertools import pairwise

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from klein.app.generator import Generator
from klein.app.tracing import Tracing
from klein.engine.engine import Engine
from klein.errors import InvalidRequest
from klein.inference.pipeline import KleinPipeline
from klein.lora.library import LoraLibrary
from klein.request.schema import parse
from klein.settings import Settings

STAGES = ["fetch", "queue", "text", "lora", "encode"] + 2 * ["denoise", "decode"]


def test_every_stage_is_a_span(tiny_pipe: KleinPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order and end to end, inside one span of the request; of a run that fails, those up to
    there; and none at all where nothing is recorded."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")
    engine = Engine(lambda: tiny_pipe, queue_size=1).start()
    library = LoraLibrary(None)
    generator = Generator(engine, library, Settings(), None, tracing=Tracing(tracer))
    engine.wait_ready(5)
    small = {"width": 64, "height": 64, "max_sequence_length": 64, "num_inference_steps": 2}
    request = parse({"prompt": "x", "num_images": 2, **small})

    async def run() -> None:
        await generator.run(request, generator.context())

    asyncio.run(run())
    assert exporter.get_finished_spans() == ()
    with tracer.start_as_current_span("caller"):
        asyncio.run(run())
    *stages, whole, _ = exporter.get_finished_spans()
    assert [span.name for span in stages] == [f"klein.{name}" for name in STAGES]
    assert {span.parent.span_id for span in stages if span.parent} == {whole.context.span_id}
    times = [(span.start_time or 0, span.end_time or 0) for span in stages]
    for (start, end), (following, _) in pairwise(times):
        assert start <= end
        assert abs(following - end) < 50e6
    denoise = [dict(span.attributes or {}) for span in stages if span.name == "klein.denoise"]
    assert denoise == [{"klein.image": n, "klein.steps": 2} for n in (1, 2)]
    exporter.clear()

    def broken(*_: object) -> None:
        raise InvalidRequest("no")

    monkeypatch.setattr(tiny_pipe.prompts, "encode", broken)
    with tracer.start_as_current_span("caller"), pytest.raises(InvalidRequest):
        asyncio.run(run())
    names = [span.name for span in exporter.get_finished_spans()]
    assert names == ["klein.fetch", "klein.queue", "klein.text", "klein.request", "caller"]
    generator.stop()
