"""nano for the benchmarks: the denoise loop on prompts it was not trained on."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from klein.inference import assemble, latents
from klein.inference.denoise import Embeddings, Run, denoise, noise_levels
from klein.models.machine import Machine
from klein.models.plan import plan
from klein.models.samplers import SAMPLERS
from klein.models.schedule import bfl_mu
from klein.settings import Settings
from training.check import test_set

SIDE = 256
STEPS = 28
GUIDANCE = 2.5
MU = bfl_mu((SIDE // 16) ** 2, STEPS)
"""Of the default schedule at 28 steps: every run of a comparison bends its levels alike."""

Pictures = NDArray[np.float32]
"""(n, height, width, 3), 0 to 255."""


class Nano:
    """nano in the eager tier, and the embeddings of `count` prompts; `side` in pixels."""

    def __init__(self, count: int, dtype: torch.dtype | None = None, side: int = SIDE) -> None:
        self.side = side
        settings = Settings.from_env({"MODEL_ID": "nano", "KLEIN_DEVICE": "cpu"})
        self.pipeline = assemble.load(plan(settings, Machine.probe({})), settings, dtype=dtype)
        length = self.pipeline.info.spec.max_sequence_length
        encode = self.pipeline.prompts.encode
        with torch.inference_mode():
            negative = encode("", length)
            self.texts = [
                Embeddings(encode(prompt, length), negative) for prompt in test_set(count)[1]
            ]

    @torch.inference_mode()
    def draw(self, *runs: Run) -> Pictures:
        """A picture of each prompt, seeds from 0 on; each run goes on where the one before ended.

        With a guidance scale of 1 or less the negative prompt is left out.
        """
        made = []
        for seed, text in enumerate(self.texts):
            image = latents.noise(self.side, self.side, seed, text.prompt.dtype, text.prompt.device)
            for one in runs:
                given = text if one.guidance_scale > 1 else Embeddings(text.prompt, None)
                clean = denoise(self.pipeline.parts.denoiser, one, given, image, lambda _: None)
                image = replace(image, latents=clean)
            drawn = latents.decode(self.pipeline.parts.vae, image.latents, self.side, self.side)
            made.append(np.asarray(drawn))
        return np.stack(made).astype(np.float32)


def run(steps: int = STEPS, sampler: str = "euler", mu: float = MU, **values: Any) -> Run:
    """A run of `steps` steps; `values` are its other fields."""
    return Run(
        noise_levels("bfl", mu, steps),
        SAMPLERS[sampler],
        **{"guidance_scale": GUIDANCE, **values},
    )


def distance(a: Pictures, b: Pictures) -> float:
    """Mean absolute difference, of 255."""
    return float(np.abs(a - b).mean())
