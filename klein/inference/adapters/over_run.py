"""The LoRAs of a job over its runs: merged at the start, and again where a scale changes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from klein.core import Job, LoraReport
from klein.inference.adapters.merge import AdapterRequest
from klein.lora import spec
from klein.lora.file import LoraFile
from klein.lora.spec import LoraSpec
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

    def warnings(self) -> Iterator[str]:
        """What a caller is to be told of what they did."""
        for each, file, report in zip(self._specs, self._files, self.reports, strict=True):
            if report.error:
                yield f"DRAWN WITHOUT A LORA: {report.error}"
                continue
            if not report.relative_change:
                yield f"LoRA {report.path!r} changes nothing: {_why_nothing(each, report)}"
            for fraction, scale in spec.unreached(report.scale, self._steps):
                yield (
                    f"LoRA {report.path!r} acts in no step at {scale:g}, its scale from "
                    f"{fraction:g} on: {self._steps} steps are too few"
                )
            idle = [pattern for pattern, count in report.block_layers.items() if not count]
            if idle and isinstance(file, LoraFile):
                layers = (name for patch in file.patches for name in patch.modules)
                yield (
                    f"block_weights of LoRA {report.path!r}: {', '.join(map(repr, idle))} decides "
                    f"for none of its layers, which are in {spec.block_names(layers)}"
                )


def _why_nothing(asked: LoraSpec, report: LoraReport) -> str:
    """Why a LoRA that was applied left the weights as they are."""
    if isinstance(report.scale, float) and abs(report.scale) < 0.005:  # nor is it known to be zero
        return f"its scale is {report.scale:g}"
    if report.effective_scale == 0 and asked.block_weights:
        return "its scale and block weights leave nothing of it"
    if report.effective_scale == 0 and isinstance(report.scale, tuple):
        return "its scale is 0 in every step"
    return "it is zero everywhere"


def _together(old: LoraReport, new: LoraReport) -> LoraReport:
    """Two reports of one LoRA as one: that of a failure, else of the larger change."""
    if old.error or new.error:
        told = old if old.error else new
    else:
        told = max(old, new, key=lambda report: report.relative_change or 0.0)
    seconds = round((old.seconds or 0.0) + (new.seconds or 0.0), 4)
    return replace(told, scale=old.scale, merges=old.merges + new.merges, seconds=seconds)
