"""From a result to what leaves the house: encoded pictures and the JSON around them."""

import base64
import hashlib
from dataclasses import asdict, dataclass, replace
from typing import Any

from klein.core import GenerationResult
from klein.errors import InvalidRequest, OutputTooLarge
from klein.output import images, metadata
from klein.output.delivery import Bucket
from klein.request.formats import FORMATS
from klein.sources.reference import shown

SMALLER = ("webp", 90)
"""What pictures become when an answer would be too large for the platform."""


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """One picture as a file."""

    seed: int
    data: bytes
    mime_type: str


def encode(result: GenerationResult) -> list[EncodedImage]:
    """Every picture in the format the parameters name, its parameters inside."""
    params = result.params
    fmt = FORMATS[params.output_format]
    return [
        EncodedImage(
            image.seed,
            images.encode(image.image, fmt, params.output_quality, metadata.to_text(result, image)),
            fmt.mime_type,
        )
        for image in result.images
    ]


def to_json(result: GenerationResult, bucket: Bucket | None = None) -> dict[str, Any]:
    """The answer of `generate_json` and of the RunPod worker."""
    return _answer(result, encode(result), bucket)


def to_json_within(
    result: GenerationResult, bucket: Bucket | None, limit_bytes: float
) -> dict[str, Any]:
    """`to_json`, kept under a platform's limit: by links if there is a bucket, else as WebP.

    The warnings say what was done. Raises OutputTooLarge when even that is too large.
    """
    encoded = encode(result)
    size = _wire_size(encoded)
    if result.params.return_type == "url" or size < limit_bytes:
        return _answer(result, encoded, bucket)
    over = f"an answer of {size / 1e6:.1f} MB is over the limit of {limit_bytes / 1e6:g} MB"
    if bucket is not None:
        over += ": pictures were put into the bucket, return_type became 'url'"
        return _answer(_changed(result, over, return_type="url"), encoded, bucket)
    name, quality = SMALLER
    why = f"{over}: pictures were written as {name} at quality {quality}; a bucket would keep them"
    smaller = _changed(result, why, output_format=name, output_quality=quality)
    encoded = encode(smaller)
    if _wire_size(encoded) >= limit_bytes:
        raise OutputTooLarge(
            f"{over}, even as {name}: ask for fewer or smaller pictures, or set KLEIN_S3_…"
        )
    return _answer(smaller, encoded, bucket)


def _wire_size(encoded: list[EncodedImage]) -> float:
    """Bytes of the JSON answer: base64 takes 4 for 3, and the rest is far under 100 KB."""
    return sum(len(picture.data) for picture in encoded) * 4 / 3 + 100_000


def _changed(result: GenerationResult, warning: str, **values: Any) -> GenerationResult:
    params = replace(result.params, **values)
    return replace(result, params=params, warnings=(*result.warnings, warning))


def _deliver(
    result: GenerationResult, encoded: list[EncodedImage], bucket: Bucket | None
) -> list[dict[str, Any]]:
    params = result.params
    entries = []
    for number, picture in enumerate(encoded):
        entry: dict[str, Any] = {
            "seed": picture.seed,
            "mime_type": picture.mime_type,
            "width": params.width,
            "height": params.height,
            "bytes": len(picture.data),
            "sha256": hashlib.sha256(picture.data).hexdigest(),
        }
        if params.return_type == "url" and bucket is not None:
            key = f"klein/{result.id}/{number}.{FORMATS[params.output_format].extension}"
            entry["url"] = bucket.put(key, picture.data, picture.mime_type)
        else:
            entry["base64"] = base64.b64encode(picture.data).decode()
        entries.append(entry)
    return entries


def require_bucket(return_type: str, bucket: Bucket | None) -> None:
    """Refuse `return_type: url` where there is nowhere to put pictures."""
    if return_type == "url" and bucket is None:
        raise InvalidRequest(
            "return_type: 'url' needs a bucket, and none is set (KLEIN_S3_ENDPOINT, "
            "KLEIN_S3_BUCKET, KLEIN_S3_KEY_ID, KLEIN_S3_SECRET); use 'base64'",
            field="return_type",
        )


def _answer(
    result: GenerationResult, encoded: list[EncodedImage], bucket: Bucket | None
) -> dict[str, Any]:
    require_bucket(result.params.return_type, bucket)
    entries = _deliver(result, encoded, bucket)
    model = result.model
    return {
        "id": result.id,
        "images": entries,
        "parameters": {
            **asdict(result.params),
            "loras": [
                {"path": shown(lora.path), "scale": lora.scale} for lora in result.params.loras
            ],
            "mu": result.mu,
            "sigmas": list(result.sigmas),
        },
        "loras": [asdict(lora) for lora in result.loras],
        "warnings": list(result.warnings),
        "timings": result.timings,
        "transformer_forwards": result.forwards,
        "model": {
            "id": model.id,
            "name": model.spec.name,
            "revision": model.revision,
            "licence": model.spec.licence,
            "device": model.device,
            "dtype": model.dtype,
            "placement": model.placement,
            "attention": model.attention,
            "speed": model.speed,
            "speed_options": list(model.speed_options),
            "versions": model.versions,
        },
    }
