"""A request's pictures: read within bounds, brought to the sizes they are used at, and the
parameters that only they decide."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from klein import pixels
from klein.core import (
    EditInputs,
    GenerationParams,
    InputImage,
    InputInfo,
    Margins,
    Progress,
    RequestContext,
)
from klein.errors import ImageUnavailable, InvalidRequest
from klein.models import sizes
from klein.models.sizes import Size
from klein.pixels import Box
from klein.request import images
from klein.request.edit import InputSources
from klein.request.images import Picture
from klein.request.resolve import Resolved, fit_size
from klein.sources.fetch import Fetcher
from klein.sources.transport import FetchFailed, Watch

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True)
class Gathered:
    """Pictures read, and what they made of the parameters."""

    params: GenerationParams
    inputs: EditInputs
    warnings: tuple[str, ...]


def gather(resolved: Resolved, context: RequestContext, fetcher: Fetcher) -> Gathered:
    """The pictures of a request at the sizes they are used at, and its parameters with them.

    Raises InvalidRequest or ImageUnavailable, naming the field and index; Cancelled or
    DeadlineExceeded.
    """
    params, sources = resolved.params, resolved.inputs
    if sources is None:
        return Gathered(params, EditInputs(), ())
    reader = _Reader(context, fetcher)
    most = sizes.reference_pixels(params.reference_megapixels or 1, sources.model.native_size)
    read = (reader.read(text, f"images.{n}") for n, text in enumerate(sources.images))
    references = tuple(_used(each, pixels.shrink_reference(each.rgb, most)) for each in read)
    base = _base(reader, sources, params) if sources.init_image is not None else None
    shape = base.shape if base else (references[0].width, references[0].height)
    params, told = _sized(params, sources, shape)
    inputs = EditInputs(references)
    if base is not None:
        inputs = base.inputs(params, references, most)
        told += base.reshaped(params)
    params = replace(
        params,
        images=tuple(_info(each, tokens=each.tokens) for each in references),
        init_image=_start_info(inputs),
        mask=base.mask_info(params) if base else None,
    )
    return Gathered(params, inputs, (*reader.warnings, *told))


class _Reader:
    """Reads the pictures of one request, whose bytes are bounded together."""

    def __init__(self, context: RequestContext, fetcher: Fetcher) -> None:
        self._context = context
        self._fetcher = fetcher
        self._left = images.MAX_TOTAL_BYTES
        self.warnings: list[str] = []

    def read(self, source: str, field: str) -> Picture:
        """One picture; raises InvalidRequest or ImageUnavailable for `field`."""
        self._context.check()
        data = (
            self._fetch(source, field)
            if images.is_address(source)
            else images.from_text(source, field)
        )
        self._left -= len(data)
        if self._left < 0:
            raise InvalidRequest(
                f"{field}: the request's pictures have more than {images.MAX_TOTAL_BYTES} bytes "
                "together; send smaller ones",
                field=field,
            )
        picture = images.decode(data, field)
        self.warnings += [f"{field}: {note}" for note in picture.notes]
        return picture

    def _fetch(self, url: str, field: str) -> bytes:
        def on_bytes(have: int, total: int | None) -> None:
            self._context.report(Progress(have, total or have, 1, 1, stage="fetch"))

        watch = Watch(self._context.deadline, self._context.check, on_bytes)
        try:
            return self._fetcher.read(url, images.MAX_BYTES, watch)
        except FetchFailed as error:
            kind = ImageUnavailable if error.retryable else InvalidRequest
            raise kind(f"{field}: {error}", field=field) from error


@dataclass(frozen=True, slots=True)
class _Base:
    """The picture that is varied or repainted, in full: the caller's, with its margins if any."""

    sent: Picture
    full: "Image"
    box: Box
    mask: "Image | None"
    mask_sent: Picture | None

    @property
    def shape(self) -> Size:
        """Of the part that is drawn."""
        left, top, right, bottom = self.box
        return right - left, bottom - top

    def inputs(
        self, params: GenerationParams, references: tuple[InputImage, ...], most: int
    ) -> EditInputs:
        """What the pipeline gets; a picture that is repainted is the first reference too."""
        size = params.width, params.height
        if self.mask is None:
            return EditInputs(references, _used(self.sent, pixels.cover(self.full, size)))
        start = _used(self.sent, pixels.stretch(self.full, self.box, size))
        context = start.image if params.extend is None else self.sent.rgb
        first = _used(self.sent, pixels.shrink_reference(context, most))
        repaint = pixels.repaint(self.full, self.mask, self.box, size, params.mask_feather or 0)
        return EditInputs((first, *references), start, repaint)

    def reshaped(self, params: GenerationParams) -> list[str]:
        """A sentence if the size that is drawn has another shape."""
        width, height = self.shape
        if sizes.same_shape((params.width, params.height), self.shape):
            return []
        done = "stretched" if self.mask else "cropped"
        return [
            f"init_image: {width}×{height} was {done} to the shape of "
            f"{params.width}×{params.height}; name only width or height to keep its own"
        ]

    def mask_info(self, params: GenerationParams) -> InputInfo | None:
        """How parameters name the mask, if one was sent."""
        if self.mask_sent is None:
            return None
        size = self.mask_sent.image.size
        return InputInfo(self.mask_sent.sha256, *size, params.width, params.height, 0)


def _base(reader: _Reader, sources: InputSources, params: GenerationParams) -> _Base:
    sent = reader.read(sources.init_image or "", "init_image")
    full, mask, mask_sent = sent.rgb, None, None
    if params.extend is not None:
        full, mask = _extended(full, params.extend)
    elif sources.mask is not None:
        mask_sent = reader.read(sources.mask, "mask")
        mask = _checked(mask_sent.mask, full.size)
    box = (0, 0, *full.size)
    if mask is not None and params.mask_padding is not None:
        box = pixels.crop_box(mask, params.mask_padding, sources.named_size)
    return _Base(sent, full, box, mask, mask_sent)


def _sized(
    params: GenerationParams, sources: InputSources, shape: Size
) -> tuple[GenerationParams, list[str]]:
    """The parameters with the size that a picture of `shape` decides, where it is open."""
    if sources.named_size:
        return params, []
    field = "height" if sources.height else "width"
    (width, height), told = fit_size(sources.size(shape), sources.model, field)
    return replace(params, width=width, height=height), told


def _extended(image: "Image", by: Margins) -> tuple["Image", "Image"]:
    width, height = image.width + by.left + by.right, image.height + by.top + by.bottom
    if width * height > images.MAX_PIXELS or max(width, height) > sizes.MAX_ASPECT * min(
        width, height
    ):
        raise InvalidRequest(
            f"extend: {width}×{height} is too large or too narrow: at most "
            f"{images.MAX_PIXELS // 10**6} million pixels, sides at most {sizes.MAX_ASPECT:g}:1",
            field="extend",
        )
    return pixels.grow(image, by.left, by.top, by.right, by.bottom)


def _checked(mask: "Image", size: Size) -> "Image":
    """The mask; raises InvalidRequest for one that does not fit or marks nothing."""
    if mask.size != size:
        raise InvalidRequest(
            f"mask: {mask.width}×{mask.height}, but init_image is {size[0]}×{size[1]}; "
            "send both at one size",
            field="mask",
        )
    if mask.getbbox() is None:
        raise InvalidRequest(
            "mask: nothing in it is white or transparent, so there is nothing to repaint",
            field="mask",
        )
    return mask


def _used(picture: Picture, image: "Image") -> InputImage:
    return InputImage(image, picture.sha256, *picture.image.size, picture.data)


def _info(picture: InputImage, tokens: int) -> InputInfo:
    size = picture.image.size
    return InputInfo(picture.sha256, picture.width, picture.height, *size, tokens)


def _start_info(inputs: EditInputs) -> InputInfo | None:
    """How parameters name the start image: as the reference that it is too when repainting."""
    if inputs.repaint is not None:
        return _info(inputs.references[0], inputs.references[0].tokens)
    return _info(inputs.start, 0) if inputs.start is not None else None
