"""Flux2KleinPipeline as diffusers gives it, and what it draws for klein's parameters."""

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
from torch import Tensor

from klein.core import GenerationParams
from klein.models.schedule import mu_of
from klein.models.sizes import tokens


class UnroundedSteps(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    """diffusers' scheduler without one rounding that klein leaves out: in bfloat16 on a CPU torch
    rounds the length of a step too, as the first factor of a product."""

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **_: Any) -> tuple[Tensor]:
        super().step(model_output, timestep, sample)
        here = self.step_index
        length = self.sigmas[here] - self.sigmas[here - 1]
        return ((sample.float() + model_output * length).to(model_output.dtype),)


def stock(folder: Path, dtype: torch.dtype = torch.float32, **modules: Any) -> Any:
    """The pipeline in `folder`, but for `modules`, which are given."""
    pipe = Flux2KleinPipeline.from_pretrained(folder, dtype=dtype, **modules)
    pipe.set_progress_bar_config(disable=True)
    if dtype == torch.bfloat16:
        pipe.scheduler = UnroundedSteps.from_config(pipe.scheduler.config)
    return pipe


def stock_image(pipe: Any, params: GenerationParams, number: int = 0) -> bytes:
    """The pixels of image `number` of `params`."""
    return bytes(_call(pipe, params, number, "pil").images[0].tobytes())


def stock_latents(pipe: Any, params: GenerationParams) -> Tensor:
    """What goes into the VAE (1, 32, height / 8, width / 8)."""
    return torch.as_tensor(_call(pipe, params, 0, "latent").images)


def _call(pipe: Any, params: GenerationParams, number: int, output: str) -> Any:
    length = params.max_sequence_length
    own = pipe.scheduler
    assert not isinstance(params.schedule, tuple)
    if params.schedule != "bfl":
        mu = mu_of(params.schedule, tokens(params.width, params.height), params.num_inference_steps)
        pipe.scheduler = type(own).from_config(
            {**own.config, "use_dynamic_shifting": False, "shift": math.exp(mu)}
        )
    try:
        return pipe(
            prompt=params.prompt,
            negative_prompt_embeds=pipe.encode_prompt(
                params.negative_prompt, max_sequence_length=length
            )[0],
            width=params.width,
            height=params.height,
            num_inference_steps=params.num_inference_steps,
            guidance_scale=params.guidance_scale,
            max_sequence_length=length,
            generator=torch.Generator("cpu").manual_seed(params.seed + number),
            output_type=output,
        )
    finally:
        pipe.scheduler = own
