"""The text inside a picture: readable by A1111 and its kin, and exact enough to draw it again.

The first lines are the prompt and the negative prompt; the last line is a list of `Key: value`,
whose last value is klein's own JSON. It holds what the others cannot, and how long the two prompts
are, so that no prompt can be mistaken for something else.
"""

import json
import re
from dataclasses import asdict
from typing import Any

from klein import __version__
from klein.core import Delivery, GeneratedImage, GenerationParams, GenerationResult, InputInfo
from klein.errors import InvalidRequest
from klein.lora.spec import LoraSpec
from klein.models.samplers import SAMPLERS
from klein.request.schema import GenerateRequest
from klein.sources.address import redacted

_NEGATIVE = "\nNegative prompt: "
_VERSION = {"Version": f"klein {__version__}"}
_MINIMAL = re.compile(r"Steps: [^\n]*, Version: klein \S+")
_OWN = re.compile(r', klein: ("(?:[^"\\]|\\.)*")$')
_IN_TEXT = ("prompt", "negative_prompt")
_HUB_ONLY = ("weight_name", "revision")
_AS_IS = (
    "preset",
    "width",
    "height",
    "num_inference_steps",
    "guidance_scale",
    "lora_error",
    "sampler",
    "schedule",
    "max_sequence_length",
    "reference_megapixels",
    "strength",
    "mask_feather",
    "mask_padding",
)
_DELIVERY = ("output_format", "output_quality")
"""What the file's own bytes depend on; whether it is sent or linked to is not among it."""
_PICTURES = ("images", "init_image", "mask")
_IN_REPORT = (
    "path",
    "scale",
    "applied",
    "sha256",
    "format",
    "rank",
    "layers_matched",
    "layers_in_file",
    "effective_scale",
    "relative_change",
    "trigger_words",
    "block_layers",
)


def to_text(result: GenerationResult, image: GeneratedImage, delivery: Delivery) -> str:
    """The text for one image of `result`, with the image's own seed.

    The same request makes the same text: what differs from run to run stays outside.
    """
    params = result.params
    own: dict[str, Any] = {name: getattr(params, name) for name in _AS_IS}
    own |= {name: len(getattr(params, name)) for name in _IN_TEXT}
    own |= {"seed": image.seed, "num_images": 1, "speed": result.model.speed}
    own |= _inputs(params)
    own |= {name: getattr(delivery, name) for name in _DELIVERY}
    applied = [report for report in result.loras if report.applied]
    own["loras"] = [
        lora_as_asked(spec) | {k: v for k in _HUB_ONLY if (v := getattr(spec, k)) is not None}
        for spec, report in zip(params.loras, result.loras, strict=True)
        if report.applied
    ]
    own["lora_reports"] = [
        {
            name: value
            for name in _IN_REPORT
            if (value := getattr(report, name)) not in (None, (), {})
        }
        for report in applied
    ]
    hashes = ", ".join(f"{x.path}: {(x.sha256 or '')[:12]}" for x in applied)
    pairs = {
        **_numbers(result, image),
        **({"Lora hashes": _quote(hashes)} if applied else {}),
        **_VERSION,
        "klein": _quote(json.dumps(own, ensure_ascii=False, separators=(",", ":"))),
    }
    return f"{params.prompt}{_NEGATIVE}{params.negative_prompt}\n{_line(pairs)}"


def lora_as_asked(spec: LoraSpec) -> dict[str, Any]:
    """What a request says of a LoRA's strength, and its path without tokens."""
    asked: dict[str, Any] = {"path": redacted(spec.path), "scale": spec.scale}
    return asked | ({"block_weights": dict(spec.block_weights)} if spec.block_weights else {})


def to_minimal_text(result: GenerationResult, image: GeneratedImage) -> str:
    """The last line alone, without anything of the caller's: no prompts, LoRAs or pictures."""
    return _line({**_numbers(result, image), **_VERSION})


def _numbers(result: GenerationResult, image: GeneratedImage) -> dict[str, Any]:
    params = result.params
    return {
        "Steps": params.num_inference_steps,
        "Sampler": SAMPLERS[params.sampler].label,
        "Schedule type": "sigmas" if isinstance(params.schedule, tuple) else params.schedule,
        "CFG scale": params.guidance_scale,
        "Seed": image.seed,
        "Size": f"{image.image.width}x{image.image.height}",
        "Model": result.model.label,
        "Speed": result.model.speed,
    }


def _line(pairs: dict[str, Any]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in pairs.items())


def from_text(text: str) -> GenerateRequest:
    """The request that draws the picture again; raises InvalidRequest for a foreign text.

    The caller's pictures are not in the text: `inputs_of` names those that belong to it.
    """
    own = _own(text)
    try:
        for name in ("lora_reports", *_PICTURES):
            own.pop(name, None)
        start = own["prompt"] + len(_NEGATIVE)
        own["negative_prompt"] = text[start : start + own["negative_prompt"]]
        own["prompt"] = text[: own["prompt"]]
        return GenerateRequest.model_validate(own)
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged() from error


def inputs_of(text: str) -> dict[str, InputInfo]:
    """The pictures that a picture was made of, by field: images.0, init_image, mask."""
    own = _own(text)
    try:
        named = {f"images.{n}": each for n, each in enumerate(own.get("images") or ())}
        named |= {name: own[name] for name in _PICTURES[1:] if own.get(name)}
        return {field: InputInfo(**each) for field, each in named.items()}
    except (TypeError, AttributeError) as error:
        raise _damaged() from error


def lora_hashes(text: str) -> dict[str, str]:
    """The sha256 of each LoRA that acted, by the path it was asked for by."""
    try:
        return {str(one["path"]): str(one["sha256"]) for one in _own(text).get("lora_reports", ())}
    except (TypeError, KeyError) as error:
        raise _damaged() from error


def _own(text: str) -> dict[str, Any]:
    """klein's own JSON."""
    hit = _OWN.search(text)
    if hit is None and _MINIMAL.fullmatch(text):
        raise InvalidRequest(
            "these parameters have no prompt: only what was drawn with KLEIN_METADATA=full can be "
            "drawn again from its file"
        )
    if hit is None:
        raise InvalidRequest("these parameters were not written by klein")
    try:
        own = json.loads(json.loads(hit[1]))
    except (ValueError, TypeError, RecursionError) as error:
        raise _damaged() from error
    if not isinstance(own, dict):
        raise _damaged()
    return own


def _damaged() -> InvalidRequest:
    return InvalidRequest("the parameters in this picture are damaged")


def _inputs(params: GenerationParams) -> dict[str, Any]:
    """The caller's pictures by sha256 and size, and what they are extended by."""
    return {
        "images": [asdict(each) for each in params.images],
        "init_image": asdict(params.init_image) if params.init_image else None,
        "mask": asdict(params.mask) if params.mask else None,
        "extend": asdict(params.extend) if params.extend else None,
    }


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
