"""How long a job will take, learnt from the jobs that were drawn."""

import heapq
import time
from dataclasses import dataclass

from klein.core import GenerationParams, GenerationResult, Job
from klein.engine.engine import QueueView
from klein.models import sizes

WEIGHT = 0.3
"""Of the newest job in each average."""


@dataclass(slots=True)
class StepTimes:
    """Exponential averages of measured seconds; every estimate is None before the first result.

    Denoising is taken as proportional to image tokens, steps, images and branches of guidance;
    what comes before it as the same for every job, and decoding as the same for every image.
    """

    _token_step: float | None = None
    _before: float = 0.0
    _decode: float = 0.0

    def learn(self, result: GenerationResult) -> None:
        """Take in what a finished job took."""
        params, timings = result.params, result.timings
        if timings.denoise <= 0:
            return
        token_step = timings.denoise / _token_steps(params)
        before, decode = timings.text + timings.lora, timings.decode / params.num_images
        weight = 1.0 if self._token_step is None else WEIGHT
        self._token_step = _blend(self._token_step or 0.0, token_step, weight)
        self._before = _blend(self._before, before, weight)
        self._decode = _blend(self._decode, decode, weight)

    def seconds(self, params: GenerationParams, denoised: float = 0.0) -> float | None:
        """What a job with these parameters has left on the GPU; `denoised` is 0 to 1."""
        if self._token_step is None:
            return None
        denoising = self._token_step * _token_steps(params) * (1 - denoised)
        before = 0.0 if denoised else self._before
        return before + denoising + self._decode * params.num_images

    def wait(self, queue: QueueView, ahead: int) -> float | None:
        """Until a GPU is free of the jobs on it and of the first `ahead` that wait."""
        if self._token_step is None or not queue.workers:
            return None
        now = time.monotonic()
        ends = [max(0.0, self._whole(each.job) - (now - each.started)) for each in queue.running]
        ends += [0.0] * (queue.workers - len(ends))
        heapq.heapify(ends)
        for job in queue.waiting[:ahead]:
            heapq.heapreplace(ends, ends[0] + self._whole(job))
        return ends[0]

    def _whole(self, job: Job) -> float:
        return self.seconds(job.params) or 0.0


def _token_steps(params: GenerationParams) -> int:
    branches = 2 if params.guidance_scale > 1 else 1
    tokens = sizes.tokens(params.width, params.height)
    return tokens * params.num_inference_steps * params.num_images * branches


def _blend(old: float, new: float, weight: float) -> float:
    return (1 - weight) * old + weight * new
