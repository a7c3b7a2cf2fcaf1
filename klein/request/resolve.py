"""From a request to parameters. Pure: the model's row and the random source are passed in."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from klein.core import Delivery, GenerationParams
from klein.errors import InvalidRequest
from klein.lora.spec import SCALE_RANGE, BlockWeights, LoraSpec, block_names, deciding
from klein.models import layers, sizes
from klein.models.catalog import ModelSpec
from klein.models.sizes import Size
from klein.request import edit
from klein.request.edit import InputSources
from klein.request.formats import FORMATS
from klein.request.presets import DEFAULT_PRESET, PRESETS, Preset
from klein.request.schema import MAX_LORAS, GenerateRequest
from klein.sources.address import redacted


@dataclass(frozen=True, slots=True)
class Resolved:
    """What will be drawn, how it leaves, a sentence for each thing that was changed, and the
    pictures that are to be read first; without any, the parameters are settled but for LoRAs."""

    params: GenerationParams
    delivery: Delivery
    warnings: tuple[str, ...]
    inputs: InputSources | None = None

    @property
    def needs_preparing(self) -> bool:
        """Whether files must be fetched or read before it can be drawn."""
        return bool(self.params.loras) or self.inputs is not None


def resolve(
    request: GenerateRequest,
    model: ModelSpec,
    draw_seed: Callable[[], int],
    *,
    prompt_loras: bool = False,
    base_loras: tuple[LoraSpec, ...] = (),
    speed: str = "",
    speeds: Collection[str] = (),
) -> Resolved:
    """Fill what `request` leaves open: its own values first, then a distilled model's, then the
    preset's. Raises InvalidRequest for a size no picture can have, for fields that do not go
    together, and for a speed or layers that are not there.

    With `prompt_loras`, `<lora:name:0.8>` in the prompt is a LoRA and is taken out of it.
    `base_loras` come first, whatever the request says. `speed` is the server's own, `speeds` are
    those that it serves; without any a request may name what it will.
    """
    preset = PRESETS[request.preset or DEFAULT_PRESET]
    warnings: list[str] = []
    prompt, named = _prompt_loras(request.prompt) if prompt_loras else (request.prompt, ())
    loras = _with_base((*_loras(request, model, warnings), *named), base_loras, warnings)
    warnings += _turbo_warning(preset, model, loras)
    edit.check_combination(request)
    own = sizes.scale_to(preset.width, preset.height, model.native_size)
    sources = edit.sources(request, own[0] * own[1], model)
    width, height = size = (_first(request.width, own[0]), _first(request.height, own[1]))
    if sources is None or sources.named_size:
        field = "height" if request.width is None else "width"
        (width, height), told = fit_size(size, model, field)
        warnings += told
    params = GenerationParams(
        prompt=prompt,
        negative_prompt=request.negative_prompt or "",
        preset=preset.name,
        width=width,
        height=height,
        num_inference_steps=_steps(request, preset, model),
        guidance_scale=_guidance(request, preset, model, warnings),
        seed=_first(request.seed, draw_seed() if request.seed is None else None),
        num_images=request.num_images,
        loras=loras,
        lora_error=request.lora_error,
        sampler=_first(request.sampler, preset.sampler),
        schedule=_first(request.schedule, preset.schedule),
        max_sequence_length=_sequence(request, preset, model, warnings),
        speed=_speed(request.speed, speed, speeds),
        **edit.settings(request),
    )
    delivery = Delivery(request.output_format, request.output_quality, request.return_type)
    exact = FORMATS[delivery.output_format].is_exact(delivery.output_quality)
    if params.mask_feather is not None and not exact:
        warnings.append(
            f"{delivery.output_format} changes pixels everywhere a little: with png, those outside "
            "the mask stay as they are"
        )
    return Resolved(params, delivery, tuple(warnings), sources)


def _steps(request: GenerateRequest, preset: Preset, model: ModelSpec) -> int:
    """How many steps a run has: as many as there are noise levels, where those are given."""
    asked = request.num_inference_steps
    if not isinstance(request.schedule, tuple):
        return int(_first(asked, model.num_inference_steps, preset.num_inference_steps))
    if asked not in (None, len(request.schedule)):
        raise InvalidRequest(
            f"num_inference_steps: {asked} steps, and schedule has {len(request.schedule)} noise "
            "levels: leave the number out",
            field="num_inference_steps",
        )
    return len(request.schedule)


def _speed(asked: str | None, own: str, offered: Collection[str]) -> str:
    """The tier that draws; raises InvalidRequest for one that this server cannot be asked for."""
    if asked is None or not offered or asked in (own, *offered):
        return asked or own
    others = ", ".join(name for name in offered if name != own) or "nothing else"
    raise InvalidRequest(
        f"speed: {asked!r} cannot be had here: this server draws in {own} and also has {others}",
        field="speed",
    )


def _with_base(
    loras: tuple[LoraSpec, ...], base: tuple[LoraSpec, ...], warnings: list[str]
) -> tuple[LoraSpec, ...]:
    """The LoRAs that are always on, then a request's others."""
    if len(loras) > MAX_LORAS:
        raise InvalidRequest(f"loras: {len(loras)} are too many, {MAX_LORAS} are the most")
    fixed = {redacted(lora.path): lora.scale for lora in base}
    for lora in loras:
        name = redacted(lora.path)
        if name in fixed and (lora.scale != fixed[name] or lora.block_weights):
            warnings.append(f"{name} is always on here at scale {fixed[name]:g}, whatever is asked")
    return (*base, *(lora for lora in loras if redacted(lora.path) not in fixed))


def _turbo_warning(preset: Preset, model: ModelSpec, loras: tuple[LoraSpec, ...]) -> list[str]:
    """What to say of a preset for turbo LoRAs where none is on."""
    if not preset.turbo or model.distilled or any(map(_is_turbo, loras)):
        return []
    return [
        f"preset {preset.name} is for a base model with a turbo LoRA on, and no LoRA here is "
        "called one: without it images are blurred"
    ]


def _is_turbo(lora: LoraSpec) -> bool:
    """Whether a LoRA's name says that it makes a base model draw in few steps."""
    return bool(re.search("turbo|distil|lightning|hyper|lcm", lora.path, re.IGNORECASE))


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def fit_size(asked: Size, model: ModelSpec, field: str) -> tuple[Size, list[str]]:
    """The size that is drawn for one asked for, and a sentence for what that means; raises
    InvalidRequest for `field`."""
    warnings = []
    size = (sizes.nearest(asked[0]), sizes.nearest(asked[1]))
    if why := sizes.fault(*asked) or sizes.fault(*size):
        raise InvalidRequest(f"{field}: {why}", field=field)
    if size != asked:
        warnings.append(
            f"size {asked[0]}×{asked[1]} was rounded to {size[0]}×{size[1]}: "
            f"sides are multiples of {sizes.MULTIPLE}"
        )
    if not model.needs_gpu and size[0] * size[1] > 2 * model.native_size**2:
        warnings.append(
            f"{size[0]}×{size[1]} is far above {model.native_size}×{model.native_size}, "
            f"which {model.name} was trained on: shapes can break"
        )
    return size, warnings


def _guidance(
    request: GenerateRequest, preset: Preset, model: ModelSpec, warnings: list[str]
) -> float:
    guidance = float(_first(request.guidance_scale, model.guidance_scale, preset.guidance_scale))
    if model.distilled and guidance > 1:
        warnings.append(
            f"guidance_scale {guidance:g} has no effect: {model.name} is distilled and draws at 1"
        )
        guidance = 1.0
    if guidance <= 1 and request.negative_prompt:
        warnings.append(
            "negative_prompt has no effect: it acts only while guidance_scale is above 1"
        )
    return guidance


def _sequence(
    request: GenerateRequest, preset: Preset, model: ModelSpec, warnings: list[str]
) -> int:
    if (request.max_sequence_length or 0) > model.max_sequence_length:
        warnings.append(
            f"max_sequence_length {request.max_sequence_length} was lowered to "
            f"{model.max_sequence_length}, the most {model.name} was made for"
        )
    wanted: int = _first(request.max_sequence_length, preset.max_sequence_length)
    return min(wanted, model.max_sequence_length)


def _loras(request: GenerateRequest, model: ModelSpec, warnings: list[str]) -> tuple[LoraSpec, ...]:
    specs = [
        LoraSpec(**lora.model_dump() | {"block_weights": tuple(lora.block_weights.items())})
        for lora in request.loras
    ]
    for number, spec in enumerate(specs):
        _require_layers(f"loras.{number}.block_weights", spec.block_weights, model)
    if request.lora_path:
        specs.append(LoraSpec(request.lora_path, request.lora_scale))
    elif request.lora_scale not in (None, 1.0):
        warnings.append(
            "lora_scale has no effect without lora_path: in `loras` each entry has its own scale"
        )
    return tuple(specs)


def _require_layers(field: str, block_weights: BlockWeights, model: ModelSpec) -> None:
    """Raise InvalidRequest for a pattern that no layer of the model matches."""
    names = layers.modules(model.double_blocks, model.single_blocks) if block_weights else []
    for pattern, weight in block_weights:
        if not any(deciding(((pattern, weight),), name) for name in names):
            raise InvalidRequest(
                f"{field}: {pattern!r} matches no layer of {model.name}; it has "
                f"{block_names(names)}, and in them such as attn.to_q and ff.linear_in",
                field=field,
            )


_IN_PROMPT = re.compile(r"<lora:([^:<>]+)(?::([^:<>]*))?>")


def _prompt_loras(prompt: str) -> tuple[str, tuple[LoraSpec, ...]]:
    """The prompt without `<lora:name:scale>`, and the LoRAs it named."""
    named = []
    for name, scale in _IN_PROMPT.findall(prompt):
        low, high = SCALE_RANGE
        try:
            value = float(scale) if scale else None
        except ValueError:
            value = high + 1
        if value is not None and not low <= value <= high:
            raise InvalidRequest(
                f"prompt: <lora:{name}:{scale}> needs a number from {low:g} to {high:g}",
                field="prompt",
            )
        path = name if "/" in name or name.endswith(".safetensors") else f"{name}.safetensors"
        named.append(LoraSpec(path, value))
    rest = re.sub(r"\s{2,}", " ", _IN_PROMPT.sub("", prompt)).strip(" ,")
    if not rest:
        raise InvalidRequest("prompt: there is nothing but LoRAs in it", field="prompt")
    return rest if named else prompt, tuple(named)
