"""Which forwards may be left out: how far pictures of nano move, on prompts it was not trained on.

    python -m benchmarks.thrift --prompts 6

Every way draws the same prompts and seeds in the eager tier; *mean* and *worst* are mean
differences, of 255, from all 56 forwards, over all pictures and in the worst of them.
"""

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import Flux2KleinPipeline

from klein.inference.denoise import Sampler
from klein.models.identify import NANO_FOLDER
from klein.models.speed import THRIFT, Thrift
from training.check import test_set

STEPS = 28
GUIDANCE = 2.5
WAYS: dict[str, dict[str, Any]] = {
    **{f"{steps} steps": {"steps": steps} for steps in (22, 18, 16)},
    **{f"no guidance after step {step}": {"stop": step} for step in (22, 17)},
    **{
        f"every {every}. after {first}": {"thrift": Thrift(first, every)}
        for first, every in ((2, 2), (3, 2), (4, 2), (6, 2), (4, 3))
    },
    "klein's turbo": {"thrift": THRIFT},
}


class Study:
    """nano, and the prompts as it reads them."""

    def __init__(self, count: int) -> None:
        self.pipe = Flux2KleinPipeline.from_pretrained(NANO_FOLDER / "model", dtype=torch.float32)
        self.pipe.set_progress_bar_config(disable=True)
        self.forward = self.pipe.transformer.forward
        self.prompts = [self._embed(prompt) for prompt in test_set(count)[1]]
        self.negative = self._embed("")

    def _embed(self, text: str) -> torch.Tensor:
        made: torch.Tensor = self.pipe.encode_prompt(text, max_sequence_length=128)[0]
        return made

    def draw(
        self, steps: int = STEPS, thrift: Thrift | None = None, stop: int = STEPS
    ) -> tuple[Any, int]:
        """Pictures (n, height, width, 3), 0 to 255, and the forwards of each; from step `stop` on
        guidance is off."""
        pictures, forwards = [], 0
        for seed, prompt in enumerate(self.prompts):
            sampler = Sampler(self.forward, paired=False, thrift=thrift)
            sampler.begin(steps, self.negative)
            stopped = stop < STEPS
            self.pipe.transformer.forward = self.forward if stopped else sampler
            made = self.pipe(
                prompt_embeds=prompt,
                negative_prompt_embeds=self.negative,
                width=256,
                height=256,
                num_inference_steps=steps,
                guidance_scale=GUIDANCE,
                generator=torch.Generator().manual_seed(seed),
                max_sequence_length=128,
                output_type="np",
                callback_on_step_end=_stop_guidance(stop),
            )
            pictures.append(made.images[0] * 255)
            forwards = STEPS + stop if stopped else sampler.forwards
        return np.stack(pictures), forwards


def _stop_guidance(step: int) -> Callable[..., dict[str, Any]]:
    def on_step(pipe: Any, done: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if done + 1 >= step:
            pipe._guidance_scale = 1.0
        return tensors

    return on_step


@torch.inference_mode()
def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=6)
    study = Study(parser.parse_args().prompts)
    reference, _ = study.draw()
    print(f"{'way':<28}{'forwards':>9}{'mean':>8}{'worst':>8}{'99 %':>8}")
    for name, options in WAYS.items():
        pictures, forwards = study.draw(**options)
        gaps = np.abs(pictures - reference)
        worst = gaps.mean((1, 2, 3)).max()
        tail = np.percentile(gaps, 99)
        print(f"{name:<28}{forwards:9}{gaps.mean():8.3f}{worst:8.3f}{tail:8.1f}", flush=True)


if __name__ == "__main__":
    main()
