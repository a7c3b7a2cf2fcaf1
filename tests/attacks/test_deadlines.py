"""Callers who wait longer than they may."""

import asyncio
import time

from klein.errors import DeadlineExceeded
from tests.support import fakes

CALLERS = 100


def test_nobody_waits_past_its_deadline() -> None:
    """A hundred behind a job that does not end are all told within a moment of theirs."""
    pipeline = fakes.FakePipeline()
    pipeline.gate.clear()
    generator = fakes.generator(pipeline, KLEIN_TIMEOUT="1", KLEIN_QUEUE_SIZE="200")

    async def wait() -> float:
        started = time.monotonic()
        try:
            await generator.run(fakes.request(), generator.context())
        except DeadlineExceeded:
            return time.monotonic() - started
        raise AssertionError("it was drawn")

    async def everybody() -> list[float]:
        return await asyncio.gather(*(wait() for _ in range(CALLERS)))

    waited = asyncio.run(everybody())
    generator.stop()
    assert min(waited) >= 1
    assert max(waited) < 2
