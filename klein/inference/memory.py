"""GPU memory: which images are admitted, and which are decoded in tiles."""

import torch

from klein.core import GenerationParams
from klein.errors import InvalidRequest, OutOfMemory
from klein.models.catalog import GB, LOW_MEMORY, PEAKS
from klein.settings import Settings


def free_bytes() -> int:
    """GPU memory that can be had, what torch holds and does not use included."""
    held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return int(torch.cuda.mem_get_info()[0]) + held


def require_room(params: GenerationParams, reference_tokens: int, available: int) -> None:
    """Raise InvalidRequest for an image that does not fit into `available` bytes at all."""
    need = PEAKS[LOW_MEMORY].of(params.width, params.height, reference_tokens)
    if need > available:
        beside = f" with {reference_tokens} reference tokens" if reference_tokens else ""
        raise InvalidRequest(
            f"width: {params.width}×{params.height}{beside} needs about {need / GB:.1f} GB of GPU "
            f"memory beside the weights and {available / GB:.1f} GB are free: ask for a smaller "
            "picture",
            field="width",
        )


def wants_tiles(params: GenerationParams, settings: Settings, tier: str, *, on_gpu: bool) -> bool:
    """Whether an image is decoded in tiles: as set, or by `auto` where it would not fit whole."""
    if settings.vae_tiling == "auto" and on_gpu:
        return free_bytes() < PEAKS[tier].of(params.width, params.height)
    return settings.vae_tiling == "on"


def out_of_memory(params: GenerationParams) -> OutOfMemory:
    """What to say of an image that did not fit with little memory either."""
    return OutOfMemory(
        f"{params.width}×{params.height} did not fit into GPU memory, twice: ask for a "
        "smaller picture, or start klein with KLEIN_OFFLOAD=model"
    )
