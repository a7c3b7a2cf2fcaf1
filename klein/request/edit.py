"""Which fields of an edit go together, and what those left open become."""

from dataclasses import dataclass
from typing import Any

from klein.core import Margins
from klein.errors import InvalidRequest
from klein.models import sizes
from klein.models.catalog import ModelSpec
from klein.models.sizes import Size
from klein.request.schema import GenerateRequest

VARY_STRENGTH, REPAINT_STRENGTH, FEATHER, MEGAPIXELS = 0.8, 1.0, 8, 1.0

NEEDS: dict[str, tuple[tuple[str, ...], str]] = {
    "reference_megapixels": (("images", "mask", "extend"), "send references as images"),
    "strength": (("init_image",), "send the picture to start from as init_image"),
    "mask": (("init_image",), "send the picture to repaint as init_image"),
    "extend": (("init_image",), "send the picture to extend as init_image"),
    "mask_feather": (("mask", "extend"), "send what to repaint as mask"),
    "mask_padding": (("mask",), "send what to repaint as mask"),
}
"""A field that acts only beside one of others, and what to do about it."""

EXCLUDES = {
    ("extend", "mask"): "repaint first, then extend the result",
}
"""Two fields that cannot both be met, and what to do instead."""


@dataclass(frozen=True, slots=True)
class InputSources:
    """The pictures of a request, unread, and what its size depends on until they are: the sides
    it names, the preset's number of `pixels`, and the model."""

    images: tuple[str, ...]
    init_image: str | None
    mask: str | None
    width: int | None
    height: int | None
    pixels: int
    model: ModelSpec

    @property
    def named_size(self) -> Size | None:
        """The size, if the request names both sides."""
        return (self.width, self.height) if self.width and self.height else None

    def size(self, shape: Size) -> Size:
        """The size that a picture of `shape` decides: the side that is named and one that follows,
        or about `pixels` pixels."""
        width, height = shape
        if self.width:
            return self.width, sizes.nearest(round(self.width * height / width))
        if self.height:
            return sizes.nearest(round(self.height * width / height)), self.height
        return sizes.shaped(width, height, self.pixels)


def check_combination(request: GenerateRequest) -> None:
    """Raise InvalidRequest for a field without what it acts on, or beside what it rules out."""
    given = {name for name in GenerateRequest.model_fields if getattr(request, name)}
    for name in NEEDS:
        others, way_out = NEEDS[name]
        if getattr(request, name) is not None and not given & set(others):
            raise InvalidRequest(
                f"{name}: acts only with {' or '.join(others)}; {way_out}, or leave {name} out",
                field=name,
            )
    for (name, other), way_out in EXCLUDES.items():
        if {name, other} <= given:
            raise InvalidRequest(f"{name}: not together with {other}; {way_out}", field=name)
    if request.extend and not any(request.extend.model_dump().values()):
        raise InvalidRequest("extend: name a side, such as {'left': 256}", field="extend")


def sources(request: GenerateRequest, pixels: int, model: ModelSpec) -> InputSources | None:
    """The pictures of a request, or None if it has none."""
    if not request.images and request.init_image is None:
        return None
    return InputSources(
        tuple(request.images),
        request.init_image,
        request.mask,
        request.width,
        request.height,
        pixels,
        model,
    )


def settings(request: GenerateRequest) -> dict[str, Any]:
    """The parameters of an edit that need no picture to be known; what does not apply is None."""
    repaints = request.mask is not None or request.extend is not None
    strength = feather = megapixels = None
    if request.init_image is not None:
        strength = _or(request.strength, REPAINT_STRENGTH if repaints else VARY_STRENGTH)
    if repaints:
        feather = _or(request.mask_feather, FEATHER)
    if repaints or request.images:
        megapixels = _or(request.reference_megapixels, MEGAPIXELS)
    return {
        "strength": strength,
        "mask_feather": feather,
        "mask_padding": request.mask_padding,
        "reference_megapixels": megapixels,
        "extend": Margins(**request.extend.model_dump()) if request.extend else None,
    }


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
