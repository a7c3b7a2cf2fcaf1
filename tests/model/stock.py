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


def stock(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline in `folder`."""
    pipe = Flux2KleinPipeline.from_pretrained(folder, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
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
    if params.schedule != "bfl":
        mu = mu_of(params.schedule, tokens(params.width, params.height), params.num_inference_steps)
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
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
