"""The LoRAs of a job over its runs: merged at the start, and again where a scale changes."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from klein.core import Job, LoraReport
from klein.inference.adapters.merge import AdapterRequest
from klein.lora import spec
from klein.sources.address import redacted

Apply = Callable[[Sequence[AdapterRequest]], list[LoraReport]]
"""Makes LoRAs active and reports what each did."""


class JobLoras:
    """What a job's LoRAs are in each step of its runs, and what they did so far."""

    def __init__(self, job: Job, steps: int, apply: Apply) -> None:
        """`steps` are those of each run."""
        self._specs = job.params.loras
        self._files = job.loras
        self._steps = steps
        self._apply = apply
        self.changes = spec.changes((each.scale or 0.0 for each in self._specs), steps)
        """The steps, from 0, before which a scale changes."""
        self.reports: list[LoraReport] = []

    def requests(self, step: int) -> list[AdapterRequest]:
        """What is active in step `step`, from 0."""
        return [
            AdapterRequest(
                redacted(each.path),
                file,
                spec.scale_at(each.scale or 0.0, step, self._steps),
                each.block_weights,
            )
            for each, file in zip(self._specs, self._files, strict=True)
        ]

    def merge(self, step: int) -> None:
        """Make active what is in step `step`."""
        made = self._apply(self.requests(step))
        if self.reports:
            self.reports = list(map(_together, self.reports, made))
        else:
            self.reports = [
                replace(report, scale=each.scale or 0.0)
                for report, each in zip(made, self._specs, strict=True)
            ]


def _together(old: LoraReport, new: LoraReport) -> LoraReport:
    """Two reports of one LoRA as one: that of a failure, else of the larger change."""
    if old.error or new.error:
        told = old if old.error else new
    else:
        told = max(old, new, key=lambda report: report.relative_change or 0.0)
    seconds = round((old.seconds or 0.0) + (new.seconds or 0.0), 4)
    return replace(told, scale=old.scale, merges=old.merges + new.merges, seconds=seconds)
