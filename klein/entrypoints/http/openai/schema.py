"""OpenAI's fields of an image request beside klein's own, and what each becomes."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from klein.errors import InvalidRequest, KleinError
from klein.request.presets import DEFAULT_PRESET
from klein.request.schema import NUMBER, GenerateRequest, parse

MAX_PARTIAL_IMAGES = 3
DEFAULT_QUALITY = "medium"

QUALITIES: dict[str, str | None] = {
    "auto": None,
    "low": "fast_preview",
    DEFAULT_QUALITY: None,
    "high": "maximum_quality",
    "xhigh": "maximum_quality",
    "max": "maximum_quality",
    "standard": None,
    "hd": "maximum_quality",
}
"""OpenAI's qualities and klein's presets; None leaves it to the default preset."""
CAPPED = ("xhigh", "max")
"""Qualities above the best preset."""
RETURN_TYPES = {"b64_json": "base64", "url": "url"}

IGNORED = {
    "user": "klein keeps no account of users",
    "safety_identifier": "klein keeps no account of users",
    "moderation": "the server's own filter decides, if it has one",
    "style": "the prompt decides",
    "complexity": "klein does not plan an image before it draws",
    "input_fidelity": "reference images are always used in full",
}
"""Fields that change nothing, each of which is answered with a warning."""
REFUSED = {
    "frame_count": "klein draws still images",
    "frame_duration_ms": "klein draws still images",
    "svg": "klein draws png, jpeg or webp",
    "markup": "describe the edit in the prompt, or send a mask",
}
"""Fields that klein cannot honour, and the way out."""


class ImageRequest(GenerateRequest):
    """An image in OpenAI's words; every field of klein's is taken beside them."""

    model: str | None = Field(
        None, max_length=500, description="the loaded model's id or name, as /v1/models has it"
    )
    n: Annotated[int, NUMBER] | None = Field(None, description="`num_images`")
    size: str | None = Field(None, max_length=20, description="`auto` or such as `1024x1536`")
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None = (
        Field(None, description="picks a preset")
    )
    output_compression: Annotated[int, Field(ge=0, le=100), NUMBER] | None = Field(
        None, description="`output_quality`, of jpeg and webp"
    )
    response_format: Literal["b64_json", "url"] | None = Field(None, description="`return_type`")
    background: Literal["transparent", "opaque", "auto"] | None = Field(
        None, description="`transparent` is refused"
    )
    stream: bool | None = Field(None, description="answer with server-sent events")
    partial_images: Annotated[int, Field(ge=0, le=MAX_PARTIAL_IMAGES), NUMBER] | None = Field(
        None, description="images to send on the way, while streaming"
    )
    user: str | None = Field(None, max_length=1000, description="no effect")
    safety_identifier: str | None = Field(None, max_length=1000, description="no effect")
    moderation: Literal["low", "auto"] | None = Field(None, description="no effect")
    style: Literal["vivid", "natural"] | None = Field(None, description="no effect")
    complexity: Literal["low", "medium", "high"] | None = Field(None, description="no effect")
    input_fidelity: Literal["high", "low"] | None = Field(None, description="no effect")
    frame_count: Any = Field(None, description="refused")
    frame_duration_ms: Any = Field(None, description="refused")
    svg: Any = Field(None, description="refused")
    markup: Any = Field(None, description="refused")


@dataclass(frozen=True, slots=True)
class Alias:
    """One of OpenAI's fields, what it is in klein's, and how that reads in a table."""

    name: str
    becomes: Callable[[Any], dict[str, Any]]
    doc: str


_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")


def _size(text: str) -> dict[str, Any]:
    if text == "auto":
        return {}
    found = _SIZE.fullmatch(text)
    if found is None:
        raise InvalidRequest(
            f"size: {text!r} is neither 'auto' nor WIDTHxHEIGHT such as 1024x1536", field="size"
        )
    return {"width": int(found[1]), "height": int(found[2])}


def _preset(quality: str) -> dict[str, Any]:
    preset = QUALITIES[quality]
    return {"preset": preset} if preset else {}


ALIASES = (
    Alias("n", lambda value: {"num_images": value}, "`num_images`"),
    Alias(
        "size",
        _size,
        "`width` and `height`; `auto` leaves them to the preset or to the image that is edited",
    ),
    Alias("quality", _preset, "`preset`, by the table below"),
    Alias(
        "output_compression",
        lambda value: {"output_quality": max(1, value)},
        "`output_quality`; 0 becomes 1, and left out it is klein's default",
    ),
    Alias(
        "response_format",
        lambda value: {"return_type": RETURN_TYPES[value]},
        "`return_type`: `b64_json` is `base64`, `url` needs a bucket",
    ),
)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request of OpenAI's in klein's words; `names` has OpenAI's name for klein's fields."""

    request: GenerateRequest
    stream: bool
    partial_images: int
    warnings: tuple[str, ...]
    names: dict[str, str]

    @contextmanager
    def own_names(self) -> Iterator[None]:
        """Errors that leave this block name fields as the caller did."""
        try:
            yield
        except KleinError as error:
            raise renamed(error, self.names) from error


def translate(body: ImageRequest, names: dict[str, str]) -> Asked:
    """`body` in klein's words; raises InvalidRequest that names the field as the caller did.

    `names` are OpenAI's for fields that a route has filled in itself.
    """
    given = {name: getattr(body, name) for name in body.model_fields_set}
    given = {name: value for name, value in given.items() if value is not None}
    _require_possible(given)
    values = {name: given[name] for name in given if name in GenerateRequest.model_fields}
    names = dict(names)
    for alias in ALIASES:
        if alias.name not in given:
            continue
        for field, value in alias.becomes(given[alias.name]).items():
            if field in values:
                raise InvalidRequest(f"{alias.name}: not together with {field}", field=alias.name)
            values[field], names[field] = value, alias.name
    try:
        request = parse(values)
    except InvalidRequest as error:
        raise renamed(error, names) from error
    if body.stream and request.return_type == "url":
        field = names.get("return_type", "return_type")
        raise InvalidRequest(f"{field}: events carry b64_json; leave {field} out", field=field)
    warnings = tuple(_warnings(given, request))
    return Asked(request, bool(body.stream), body.partial_images or 0, warnings, names)


def refusal(name: str) -> InvalidRequest:
    """Why a field of OpenAI's is not taken."""
    return InvalidRequest(f"{name}: is not taken here; {REFUSED[name]}", field=name)


def quality_of(preset: str | None) -> str:
    """OpenAI's word for a preset."""
    preset = preset or DEFAULT_PRESET
    return next((name for name, row in QUALITIES.items() if row == preset), DEFAULT_QUALITY)


def _require_possible(given: dict[str, Any]) -> None:
    for name in REFUSED:
        if name in given:
            raise refusal(name)
    if given.get("background") == "transparent":
        raise InvalidRequest(
            "background: klein's images are opaque; leave it out or send 'opaque'",
            field="background",
        )


def _warnings(given: dict[str, Any], request: GenerateRequest) -> Iterator[str]:
    for name, why in IGNORED.items():
        if name in given:
            yield f"{name} has no effect: {why}"
    if given.get("quality") in CAPPED:
        yield f"quality {given['quality']!r} is drawn as 'high', the most there is"
    if "output_compression" in given and request.output_format == "png":
        yield "output_compression has no effect: it acts on jpeg and webp"
    if given.get("partial_images") and not given.get("stream"):
        yield "partial_images has no effect: it acts with stream"


def renamed(error: KleinError, names: dict[str, str]) -> KleinError:
    """`error` with the caller's name for its field."""
    name = names.get(error.field or "")
    if name is None:
        return error
    message = str(error).removeprefix(f"{error.field}: ")
    return type(error)(f"{name}: {message}", field=name)
