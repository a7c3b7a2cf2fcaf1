"""The wire shape of a request: every field typed and bounded, unknown keys refused."""

import math
from collections.abc import Collection, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError, PydanticKnownError

from klein.errors import InvalidRequest, unknown
from klein.lora import spec
from klein.lora.spec import MAX_BLOCK_WEIGHTS, MAX_PATTERN, MAX_POINTS, SCALE_RANGE, Curve
from klein.models import schedule as schedules
from klein.models.samplers import DEFAULT_SAMPLER, SAMPLERS
from klein.models.schedule import MAX_STEPS, MU_RANGE, SCHEDULES, Schedule
from klein.models.speed import TIERS
from klein.request import formats, presets
from klein.request.images import MAX_IMAGES, MAX_TEXT

MAX_LORAS = 8
MAX_PROMPT = 5000
"""Characters; what the encoder reads of a prompt is about half of that."""


def _number(value: Any) -> Any:
    """JSON's own numbers, 28.0 for 28 too; neither true nor "5" is one."""
    if isinstance(value, bool | str):
        raise PydanticCustomError("number", "must be a number, not {kind}", {"kind": _kind(value)})
    return value


def _kind(value: bool | str) -> str:
    return "true or false" if isinstance(value, bool) else "text"


NUMBER = BeforeValidator(_number)
Scale = Annotated[float, Field(ge=SCALE_RANGE[0], le=SCALE_RANGE[1]), NUMBER]
Margin = Annotated[int, Field(ge=0, le=4096), NUMBER]


def _one_of(
    kind: str, known: Collection[str], aliases: dict[str, str] | None = None
) -> AfterValidator:
    def check(value: str) -> str:
        value = (aliases or {}).get(value, value)
        if value not in known:
            why = unknown(kind, value, list(known))
            raise PydanticCustomError("unknown_name", "{why}", {"why": why})
        return value

    return AfterValidator(check)


def _enum(known: Collection[str]) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "enum": list(known)})


def _schedule(value: Any) -> Schedule:
    """A name from SCHEDULES, mu, or noise levels; numbers in text, with commas between several, are
    taken as the command line sends them."""
    if isinstance(value, str):
        if value in SCHEDULES:
            return value
        try:
            numbers = [float(number) for number in value.split(",")]
        except ValueError:
            why = unknown("schedule", value, [*SCHEDULES, "a number (mu)"])
            raise PydanticCustomError("unknown_name", "{why}", {"why": why}) from None
        value = numbers if "," in value else numbers[0]
    if isinstance(value, list | tuple):
        return _levels(value)
    low, high = MU_RANGE
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise PydanticCustomError(
            "schedule",
            "a schedule is a name, a list of noise levels, or mu, a number from {low} to {high}",
            {"low": low, "high": high},
        )
    return float(value)


def _levels(values: Sequence[Any]) -> tuple[float, ...]:
    """Noise levels, without the 0 that may end them."""
    numeric = all(map(_is_number, values))
    levels = values[:-1] if numeric and values and values[-1] == 0 else values
    if why := schedules.fault(levels) if numeric else "noise levels are numbers":
        raise PydanticCustomError("schedule", "{why}", {"why": why})
    return tuple(map(float, levels))


def _scale(value: Any) -> float | Curve:
    """A number within SCALE_RANGE, or points of a scale over the run."""
    if isinstance(value, list | tuple):
        return _points(value)
    low, high = SCALE_RANGE
    if not _is_number(_number(value)):
        raise PydanticKnownError("float_type")
    if isinstance(value, float) and not math.isfinite(value):
        raise PydanticKnownError("finite_number")
    if value < low:
        raise PydanticKnownError("greater_than_equal", {"ge": low})
    if value > high:
        raise PydanticKnownError("less_than_equal", {"le": high})
    return float(value)


def _points(value: Sequence[Any]) -> Curve:
    pairs = all(
        isinstance(point, list | tuple) and len(point) == 2 and all(map(_is_number, point))
        for point in value
    )
    why = spec.fault(value) if pairs else "is pairs of a fraction of the run and a scale"
    if why:
        raise PydanticCustomError(
            "points", "a scale over the run {why}; such as [[0, 0.4], [0.5, 1]]", {"why": why}
        )
    return tuple((float(fraction), float(scale)) for fraction, scale in value)


def _patterns(value: Any) -> Any:
    """Block weights whose patterns can be echoed."""
    if isinstance(value, dict):
        if len(value) > MAX_BLOCK_WEIGHTS:
            raise PydanticCustomError(
                "patterns", "{most} patterns are the most", {"most": MAX_BLOCK_WEIGHTS}
            )
        if not all(isinstance(key, str) and 1 <= len(key) <= MAX_PATTERN for key in value):
            raise PydanticCustomError(
                "patterns", "a pattern has 1 to {most} characters", {"most": MAX_PATTERN}
            )
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _none_if_blank(value: Any) -> Any:
    return None if isinstance(value, str) and not value.strip() else value


PresetName = Annotated[str, _one_of("preset", presets.PRESETS), _enum(presets.PRESETS)]
FormatName = Annotated[
    str, _one_of("format", formats.FORMATS, formats.FORMAT_ALIASES), _enum(formats.FORMATS)
]
SamplerName = Annotated[str, _one_of("sampler", SAMPLERS), _enum(SAMPLERS)]
SpeedName = Annotated[str, _one_of("speed", TIERS), _enum(TIERS)]
ReturnType = Annotated[
    str, _one_of("return_type", formats.RETURN_TYPES), _enum(formats.RETURN_TYPES)
]
ScheduleField = Annotated[
    str | float | tuple[float, ...],
    BeforeValidator(_schedule),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "enum": list(SCHEDULES)},
                {"type": "number"},
                {"type": "array", "items": {"type": "number"}, "maxItems": MAX_STEPS + 1},
            ]
        }
    ),
]


ScaleField = Annotated[
    float | Curve,
    BeforeValidator(_scale),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": SCALE_RANGE[0], "maximum": SCALE_RANGE[1]},
                {
                    "type": "array",
                    "items": {
                        "type": "array",
                        "items": {"type": "number"},
                        "minItems": 2,
                        "maxItems": 2,
                    },
                    "minItems": 1,
                    "maxItems": MAX_POINTS,
                },
            ]
        }
    ),
]
BlockWeightsField = Annotated[
    dict[str, Scale], Field(max_length=MAX_BLOCK_WEIGHTS), BeforeValidator(_patterns)
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            known = list(cls.model_fields)
            for key in data:
                if key not in known:
                    why = unknown("field", str(key), known)
                    raise PydanticCustomError("unknown_field", "{why}", {"why": why})
        return data


class LoraRequest(_Strict):
    """One LoRA: a file in the LoRA folder or a Hub repository."""

    path: str = Field(
        min_length=1,
        max_length=2000,
        description="`name.safetensors` in the LoRA folder, `owner/repo[@revision]` on the Hub, "
        "an https address, or `civitai:VERSION`",
    )
    scale: ScaleField | None = Field(
        None,
        description="1 is as trained; the file's own default if left out; "
        "`[[0, 0.4], [0.5, 1]]` is 0.4 for the first half of the run's steps and 1 from there on",
    )
    block_weights: BlockWeightsField = Field(
        {},
        description="what the scale is multiplied by in layers whose names match: "
        '`{"single_transformer_blocks.*": 0.5}`; of several patterns the last decides',
    )
    weight_name: str | None = Field(
        None, max_length=500, description="which file of a Hub repository that has several"
    )
    revision: str | None = Field(None, max_length=200, description="Hub commit, tag or branch")
    trigger: Literal["off", "auto"] = Field(
        "off", description="`auto` puts its trigger word in front of a prompt that lacks it"
    )


class ExtendRequest(_Strict):
    """Pixels that the init image grows by on each side."""

    left: Margin = 0
    right: Margin = 0
    top: Margin = 0
    bottom: Margin = 0


InputSource = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
"""A caller's picture: an https address, a data URI or base64."""


class GenerateRequest(_Strict):
    """A picture to make. Fields left out or null are filled by the preset or the model."""

    prompt: str = Field(
        min_length=1, max_length=MAX_PROMPT, description="what to draw; put the trigger word in it"
    )
    negative_prompt: str | None = Field(
        None,
        max_length=MAX_PROMPT,
        description="what to keep out; acts while guidance_scale is above 1",
    )
    preset: PresetName | None = Field(
        None, description=f"named defaults; `{presets.DEFAULT_PRESET}` if left out"
    )
    width: Annotated[int, Field(ge=1, le=8192), NUMBER] | None = Field(
        None, description="pixels; rounded to a multiple of 16, at least 64"
    )
    height: Annotated[int, Field(ge=1, le=8192), NUMBER] | None = Field(
        None, description="pixels; at most 4 megapixels in all, sides at most 8:1"
    )
    num_inference_steps: Annotated[int, Field(ge=1, le=MAX_STEPS), NUMBER] | None = Field(
        None, description="denoising steps"
    )
    guidance_scale: Annotated[float, Field(ge=0, le=20), NUMBER] | None = Field(
        None, description="prompt adherence; 1 or less halves the work"
    )
    seed: Annotated[int, Field(ge=0, le=2**32 - 1), NUMBER] | None = Field(
        None, description="same seed, same picture; random if left out"
    )
    num_images: Annotated[int, Field(ge=1, le=4), NUMBER] = Field(
        1, description="pictures, with seeds seed, seed+1, …"
    )
    loras: list[LoraRequest] = Field(
        [], max_length=MAX_LORAS, description="LoRAs with their scales, applied together"
    )
    lora_error: Literal["continue", "fail"] = Field(
        "continue", description="when a LoRA fails: draw without it and say so, or refuse"
    )
    sampler: SamplerName | None = Field(
        None, description=f"how steps are taken; `{DEFAULT_SAMPLER}` if left out"
    )
    schedule: ScheduleField | None = Field(
        None, description="time shift: a name, a number taken as mu, or a list of noise levels"
    )
    speed: SpeedName | None = Field(
        None,
        description="the tier, one of those that `/capabilities` lists; the server's own if left "
        "out",
    )
    max_sequence_length: Annotated[int, Field(ge=16, le=512), NUMBER] | None = Field(
        None, description="prompt tokens read; part of a picture's identity"
    )
    images: list[InputSource] = Field(
        [],
        max_length=MAX_IMAGES,
        description="references, which the prompt calls image 1, image 2, …: each an https "
        "address, a data URI or base64 of a PNG, JPEG or WebP",
    )
    reference_megapixels: Annotated[float, Field(ge=0.0625, le=4), NUMBER] | None = Field(
        None, description="the most a reference is used at; 1 if left out"
    )
    init_image: InputSource | None = Field(
        None, description="a picture to vary, or with mask or extend to repaint in part"
    )
    strength: Annotated[float, Field(gt=0, le=1), NUMBER] | None = Field(
        None,
        description="how far to go from init_image; 0.8 if left out, 1 when repainting",
    )
    mask: InputSource | None = Field(
        None,
        description="what to repaint of init_image: white, or where it has alpha, transparent",
    )
    mask_feather: Annotated[int, Field(ge=0, le=256), NUMBER] | None = Field(
        None, description="pixels inside the mask that blend; 8 if left out"
    )
    mask_padding: Annotated[int, Field(ge=0, le=4096), NUMBER] | None = Field(
        None,
        description="draw only the mask and so many pixels around it; all if left out",
    )
    extend: ExtendRequest | None = Field(
        None, description="pixels to add to init_image: left, right, top, bottom"
    )
    output_format: FormatName = Field(formats.DEFAULT_FORMAT, description="picture format")
    output_quality: Annotated[int, Field(ge=1, le=100), NUMBER] = Field(
        formats.DEFAULT_QUALITY, description="of jpeg and webp"
    )
    return_type: ReturnType = Field("base64", description="how JSON answers carry pictures")
    lora_path: Annotated[str | None, BeforeValidator(_none_if_blank)] = Field(
        None, max_length=2000, description="klein's predecessor's way to name one LoRA"
    )
    lora_scale: Scale | None = Field(None, description="the scale of `lora_path`")

    @model_validator(mode="after")
    def _whole(self) -> "GenerateRequest":
        if not self.prompt.strip():
            raise PydanticCustomError("blank_prompt", "prompt: say what to draw")
        return self


def parse(data: Any) -> GenerateRequest:
    """`data` as a request; raises InvalidRequest that names the field and the way out."""
    try:
        return GenerateRequest.model_validate(data)
    except ValidationError as error:
        raise invalid(error.errors(include_url=False, include_input=False)) from error


def invalid(errors: Sequence[Any]) -> InvalidRequest:
    """pydantic's list of errors as one that names the first field and counts the others."""
    field = ".".join(str(part) for part in errors[0]["loc"])
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    message = f"{errors[0]['msg']}{more}"
    return InvalidRequest(f"{field}: {message}" if field else message, field=field or None)
