"""OpenAI's objects: images, their token counts, events and models."""

import base64
import time
from dataclasses import replace
from enum import StrEnum
from typing import Any

from klein.app.generator import Generated
from klein.core import GenerationParams, ModelInfo, Preview
from klein.entrypoints.http.openai.schema import Asked, quality_of
from klein.models import sizes
from klein.output import images, response
from klein.output.delivery import Bucket
from klein.output.marks import Marks
from klein.request.formats import FORMATS

STARTED = int(time.time())
"""When this server came up, which is when its model was made as far as clients are concerned."""


class Kind(StrEnum):
    """What a route makes, as its events are named."""

    GENERATION = "image_generation"
    EDIT = "image_edit"


def images_json(asked: Asked, generated: Generated, bucket: Bucket | None) -> dict[str, Any]:
    """The answer of a route: the images, and under `klein` all there is to know about them."""
    told, entries = _told(asked, generated, bucket)
    params = generated.result.params
    return {
        "created": int(time.time()),
        "data": entries,
        **_look(f"{entries[0]['width']}x{entries[0]['height']}", params.preset, generated),
        "usage": usage(params, params.num_images),
        "klein": told,
    }


def completed_events(asked: Asked, generated: Generated, kind: Kind) -> list[dict[str, Any]]:
    """One event for each image; the tokens that went in are counted in the first."""
    told, entries = _told(asked, generated, None)
    params = generated.result.params
    return [
        {
            "type": f"{kind}.completed",
            **entry,
            "created_at": int(time.time()),
            **_look(f"{entry['width']}x{entry['height']}", params.preset, generated),
            "usage": usage(params, 1, with_input=number == 0),
            "image_index": number,
            "klein": told,
        }
        for number, entry in enumerate(entries)
    ]


def partial_event(
    asked: Asked, preview: Preview, index: int, kind: Kind, marks: Marks
) -> dict[str, Any]:
    """A preview as partial image `index` (from 0) of its image."""
    request, picture = asked.request, preview.picture
    fmt = FORMATS[request.output_format]
    data = images.encode(picture, fmt, request.output_quality, "", marks.xmp(request))
    return {
        "type": f"{kind}.partial_image",
        "b64_json": base64.b64encode(data).decode(),
        "partial_image_index": index,
        "created_at": int(time.time()),
        "size": f"{picture.width}x{picture.height}",
        "quality": quality_of(request.preset),
        "background": "opaque",
        "output_format": fmt.name,
        "image_index": preview.image - 1,
        "klein": {"step": preview.step, "steps": preview.steps},
    }


def usage(params: GenerationParams, drawn: int, *, with_input: bool = True) -> dict[str, Any]:
    """Tokens that the transformer sees: of the prompt, which is padded to `max_sequence_length`,
    of the reference images, and of `drawn` images, one for 16×16 pixels."""
    sources = [*params.images, params.init_image]
    text = params.max_sequence_length if with_input else 0
    seen = sum(each.tokens for each in sources if each) if with_input else 0
    output = sizes.tokens(params.width, params.height) * drawn
    return {
        "input_tokens": text + seen,
        "input_tokens_details": {"text_tokens": text, "image_tokens": seen},
        "output_tokens": output,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": output},
        "total_tokens": text + seen + output,
    }


def model_names(info: ModelInfo) -> set[str]:
    """What a request may call the loaded model, in lower case."""
    names = (info.id, info.spec.name, info.spec.repo)
    return {name.lower() for name in names if name}


def model_json(info: ModelInfo) -> dict[str, Any]:
    """The loaded model as OpenAI's object."""
    owner = (info.spec.repo or "klein/").split("/")[0]
    return {
        "id": info.id,
        "object": "model",
        "created": STARTED,
        "owned_by": owner,
        "klein": response.model_json(info),
    }


def _told(
    asked: Asked, generated: Generated, bucket: Bucket | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """klein's answer without its images, and these as OpenAI's objects."""
    warnings = (*asked.warnings, *generated.result.warnings)
    result = replace(generated.result, warnings=warnings)
    told = response.to_json(result, generated.delivery, generated.marks, bucket)
    entries = told.pop("images")
    for entry in entries:
        if "base64" in entry:
            entry["b64_json"] = entry.pop("base64")
        if result.params.prompt != asked.request.prompt:
            entry["revised_prompt"] = result.params.prompt
    return told, entries


def _look(size: str, preset: str, generated: Generated) -> dict[str, Any]:
    return {
        "size": size,
        "quality": quality_of(preset),
        "background": "opaque",
        "output_format": generated.delivery.output_format,
    }
