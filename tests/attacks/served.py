"""klein on a slow pipeline without a model: `bentoml serve tests.attacks.served:Klein`.

LOAD_SECONDS is what loading takes; a step takes STEP_SECONDS.
"""

import asyncio
import os
import time
from typing import Any

from klein.core import GenerationResult, Job
from service import APP, Klein
from tests.support import fakes

STEP_SECONDS = 0.1


class SlowPipeline(fakes.FakePipeline):
    """Takes STEP_SECONDS for each step, before it draws."""

    def generate(self, job: Job) -> GenerationResult:
        for _ in range(job.params.num_inference_steps):
            job.context.check()
            time.sleep(STEP_SECONDS)
        return super().generate(job)


def load() -> SlowPipeline:
    time.sleep(float(os.environ.get("LOAD_SECONDS", "0")))
    return SlowPipeline()


inner: Any = Klein.inner  # type: ignore[attr-defined]
inner.load = staticmethod(load)


@APP.get("/worker", include_in_schema=False)
async def worker() -> dict[str, int]:
    """Its process id, and how many tasks its event loop has."""
    return {"pid": os.getpid(), "tasks": len(asyncio.all_tasks())}
