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
from klein.core import GeneratedImage, GenerationResult
from klein.errors import InvalidRequest
from klein.request.schema import GenerateRequest
from klein.sources.reference import shown

_NEGATIVE = "\nNegative prompt: "
_OWN = re.compile(r', klein: ("(?:[^"\\]|\\.)*")$')
_IN_TEXT = ("prompt", "negative_prompt")
_HUB_ONLY = ("weight_name", "revision")


def to_text(result: GenerationResult, image: GeneratedImage) -> str:
    """The text for one picture of `result`, with the picture's own seed."""
    params = result.params
    own: dict[str, Any] = asdict(params) | {"seed": image.seed, "num_images": 1}
    for name in _IN_TEXT:
        own[name] = len(own[name])
    applied = [report for report in result.loras if report.applied]
    own["loras"] = [
        {"path": shown(spec.path), "scale": spec.scale}
        | {k: v for k in _HUB_ONLY if (v := getattr(spec, k)) is not None}
        for spec, report in zip(params.loras, result.loras, strict=True)
        if report.applied
    ]
    own["lora_reports"] = [
        {name: value for name, value in asdict(report).items() if value not in (None, ())}
        for report in applied
    ]
    pairs = {
        "Steps": params.num_inference_steps,
        "Sampler": "Euler",
        "Schedule type": params.schedule,
        "CFG scale": params.guidance_scale,
        "Seed": image.seed,
        "Size": f"{params.width}x{params.height}",
        "Model": result.model.spec.name,
        "Speed": result.model.speed,
        "Lora hashes": _quote(", ".join(f"{x.path}: {(x.sha256 or '')[:12]}" for x in applied)),
        "Version": f"klein {__version__}",
        "klein": _quote(json.dumps(own, ensure_ascii=False, separators=(",", ":"))),
    }
    if not applied:
        del pairs["Lora hashes"]
    last = ", ".join(f"{key}: {value}" for key, value in pairs.items())
    return f"{params.prompt}{_NEGATIVE}{params.negative_prompt}\n{last}"


def from_text(text: str) -> GenerateRequest:
    """The request that draws the picture again; raises InvalidRequest for a foreign text."""
    hit = _OWN.search(text)
    if hit is None:
        raise InvalidRequest("these parameters were not written by klein")
    try:
        own = json.loads(json.loads(hit[1]))
        own.pop("lora_reports", None)  # for people; the picture is drawn from the rest
        start = own["prompt"] + len(_NEGATIVE)
        own["negative_prompt"] = text[start : start + own["negative_prompt"]]
        own["prompt"] = text[: own["prompt"]]
        return GenerateRequest.model_validate(own)
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidRequest("the parameters in this picture are damaged") from error


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
