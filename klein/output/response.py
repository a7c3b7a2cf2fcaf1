"""From a result to what leaves: encoded images and the JSON around them."""

import base64
import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from klein.core import (
    Delivery,
    FilterReport,
    GeneratedImage,
    GenerationParams,
    GenerationResult,
    LoraReport,
    ModelInfo,
    Timings,
)
from klein.errors import InvalidRequest, OutputTooLarge
from klein.output import images, metadata
from klein.output.delivery import Bucket
from klein.output.marks import Marks
from klein.request.formats import FORMATS

SMALLER = ("webp", 90)
"""Format and quality that images get when an answer would be too large for the platform."""
TEXTS: dict[str, Callable[[GenerationResult, GeneratedImage, Delivery], str]] = {
    "full": metadata.to_text,
    "minimal": lambda result, image, _: metadata.to_minimal_text(result, image),
    "none": lambda *_: "",
}
"""The text inside an image, by KLEIN_METADATA."""
ENVELOPE_BYTES = 100_000
"""Of an answer beside its images: more than it ever takes."""


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """One image as a file; `unchanged_pixels` is left out of formats that change them."""

    seed: int
    data: bytes
    mime_type: str
    width: int
    height: int
    unchanged_pixels: int | None = None


Place = Callable[[int, EncodedImage], dict[str, str]]
"""Puts an image where it is to be found, given its number from 0: {"base64": …} or {"url": …}."""


def encode(result: GenerationResult, delivery: Delivery, marks: Marks) -> list[EncodedImage]:
    """Every image in the format asked for, its parameters and marks inside.

    Raises InternalError for one that cannot be signed.
    """
    return [_encode(result, image, delivery, marks) for image in result.images]


def _encode(
    result: GenerationResult, image: GeneratedImage, delivery: Delivery, marks: Marks
) -> EncodedImage:
    fmt = FORMATS[delivery.output_format]
    return EncodedImage(
        image.seed,
        image.file or _file(result, image, delivery, marks),
        fmt.mime_type,
        *image.image.size,
        image.unchanged_pixels if fmt.is_exact(delivery.output_quality) else None,
    )


def _file(
    result: GenerationResult, image: GeneratedImage, delivery: Delivery, marks: Marks
) -> bytes:
    fmt, quality = FORMATS[delivery.output_format], delivery.output_quality
    text = TEXTS[marks.metadata](result, image, delivery)
    data = images.encode(image.image, fmt, quality, text, marks.xmp(result.params))
    return marks.sign(data, fmt.mime_type, result)


def to_json(
    result: GenerationResult, delivery: Delivery, marks: Marks, bucket: Bucket | None = None
) -> dict[str, Any]:
    """The answer of `generate_json`."""
    return _answer(result, delivery, marks, encode(result, delivery, marks), bucket)


def to_json_within(
    result: GenerationResult,
    delivery: Delivery,
    marks: Marks,
    bucket: Bucket | None,
    limit_bytes: float,
) -> dict[str, Any]:
    """`to_json`, kept under a platform's limit: by links if there is a bucket, else as WebP.

    The warnings say what was done. Raises OutputTooLarge when even that is too large.
    """
    encoded = encode(result, delivery, marks)
    size = _wire_size(encoded)
    if delivery.return_type == "url" or size < limit_bytes:
        return _answer(result, delivery, marks, encoded, bucket)
    over = f"an answer of {size / 1e6:.1f} MB is over the limit of {limit_bytes / 1e6:g} MB"
    if bucket is not None:
        warned = _warned(
            result, f"{over}: images were put into the bucket, return_type became 'url'"
        )
        return _answer(warned, replace(delivery, return_type="url"), marks, encoded, bucket)
    name, quality = SMALLER
    warned = _warned(
        result,
        f"{over}: images were written as {name} at quality {quality}; a bucket would keep them",
    )
    smaller = replace(delivery, output_format=name, output_quality=quality)
    encoded = encode(warned, smaller, marks)
    if _wire_size(encoded) >= limit_bytes:
        raise OutputTooLarge(
            f"{over}, even as {name}: ask for fewer or smaller images, or set KLEIN_S3_…"
        )
    return _answer(warned, smaller, marks, encoded, bucket)


def require_bucket(return_type: str, bucket: Bucket | None) -> None:
    """Refuse `return_type: url` where there is nowhere to put images."""
    if return_type == "url" and bucket is None:
        raise InvalidRequest(
            "return_type: 'url' needs a bucket, and none is set (KLEIN_S3_ENDPOINT, "
            "KLEIN_S3_BUCKET, KLEIN_S3_KEY_ID, KLEIN_S3_SECRET); use 'base64'",
            field="return_type",
        )


def lora_json(report: LoraReport) -> dict[str, Any]:
    """One LoRA's report as answers and headers carry it."""
    return asdict(report)


def timings_json(timings: Timings) -> dict[str, float]:
    """Seconds by stage as answers and headers carry them."""
    return {stage: round(seconds, 4) for stage, seconds in asdict(timings).items()}


def model_json(model: ModelInfo) -> dict[str, Any]:
    """The model as answers carry it."""
    return {
        "id": model.id,
        "name": model.spec.name,
        "revision": model.revision,
        "transformer": model.transformer,
        "license": model.spec.license,
        "device": model.device,
        "dtype": model.dtype,
        "placement": model.placement,
        "attention": model.attention,
        "speed": model.speed,
        "speed_options": list(model.speed_options),
        "versions": model.versions,
    }


def parameters_json(params: GenerationParams, delivery: Delivery) -> dict[str, Any]:
    """Everything that was decided, drawing and delivery, under the names of a request."""
    loras = [metadata.lora_as_asked(lora) for lora in params.loras]
    return {**asdict(params), "loras": loras, **asdict(delivery)}


def filter_json(report: FilterReport) -> dict[str, Any]:
    """Which images the filter refused or marked, and why; `image` is null for the request."""
    told: dict[str, Any] = {"name": report.name, "refused": [], "marked": []}
    for note in report.notes:
        entry = {"image": note.image, "seed": note.seed, "reason": note.reason}
        told["refused" if note.refused else "marked"].append(entry)
    return told


def inline(_: int, image: EncodedImage) -> dict[str, str]:
    """An image in the answer itself."""
    return {"base64": base64.b64encode(image.data).decode()}


def _answer(
    result: GenerationResult,
    delivery: Delivery,
    marks: Marks,
    encoded: list[EncodedImage],
    bucket: Bucket | None,
) -> dict[str, Any]:
    require_bucket(delivery.return_type, bucket)
    if delivery.return_type != "url" or bucket is None:
        return answer(result, delivery, marks, encoded, inline)
    extension = FORMATS[delivery.output_format].extension

    def put(number: int, image: EncodedImage) -> dict[str, str]:
        key = f"klein/{result.id}/{number}.{extension}"
        return {"url": bucket.put(key, image.data, image.mime_type)}

    return answer(result, delivery, marks, encoded, put)


def answer(
    result: GenerationResult,
    delivery: Delivery,
    marks: Marks,
    encoded: list[EncodedImage],
    place: Place,
) -> dict[str, Any]:
    """All there is to know about a result, with its images where `place` puts them."""
    return {
        "id": result.id,
        "images": [
            {**_image_json(image), **place(number, image)} for number, image in enumerate(encoded)
        ],
        "parameters": {
            **parameters_json(result.params, delivery),
            "mu": result.mu,
            "sigmas": list(result.sigmas),
        },
        "loras": [lora_json(report) for report in result.loras],
        "warnings": list(result.warnings),
        "timings": timings_json(result.timings),
        "transformer_forwards": result.forwards,
        "marks": marks.of(result.params),
        "filter": filter_json(result.filter) if result.filter else None,
        "model": model_json(result.model),
    }


def _image_json(image: EncodedImage) -> dict[str, Any]:
    told: dict[str, Any] = {
        "seed": image.seed,
        "mime_type": image.mime_type,
        "width": image.width,
        "height": image.height,
        "bytes": len(image.data),
        "sha256": hashlib.sha256(image.data).hexdigest(),
    }
    if image.unchanged_pixels is not None:
        told["unchanged_pixels"] = image.unchanged_pixels
    return told


def _wire_size(encoded: list[EncodedImage]) -> float:
    """Bytes of the JSON answer: base64 takes 4 for 3."""
    return sum(len(image.data) for image in encoded) * 4 / 3 + ENVELOPE_BYTES


def _warned(result: GenerationResult, warning: str) -> GenerationResult:
    return replace(result, warnings=(*result.warnings, warning))
