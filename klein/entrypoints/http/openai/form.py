"""The multipart form of an edit: bounded while it is read, its texts made into values."""

import base64
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from klein.entrypoints.http.limits import media_type
from klein.entrypoints.http.openai.schema import REFUSED, ImageRequest, refusal, renamed
from klein.errors import Cancelled, InvalidRequest, RequestTooLarge
from klein.request.images import MAX_BYTES, MAX_IMAGES
from klein.request.schema import invalid

MAX_FILES = MAX_IMAGES + 1
"""Images and a mask."""
MAX_FIELDS = 100
MAX_TEXT = 64_000
"""Bytes of a part that is no file."""
FILES = {"image": "image", "image[]": "image", "mask": "mask"}
"""Names of parts that may be files, and what they are."""
STARTS_FROM_FIRST = ("mask", "extend", "strength")
"""klein's fields that act on an image to start from: with one of them the first image is that,
and the others are references."""
FILLED_IN = ("images", "init_image")
"""klein's fields that this route makes of `image`."""

_SCHEMA = ImageRequest.model_json_schema()
_NAME = re.compile(r"(\w{1,100})(\[\])?(?:\[(\w{1,100})\])?")


@dataclass(frozen=True, slots=True)
class EditForm:
    """An edit, and the caller's names of the images that became klein's fields."""

    body: ImageRequest
    names: dict[str, str]


async def read_edit(request: Request) -> EditForm:
    """The form of an edit; raises InvalidRequest, RequestTooLarge or Cancelled."""
    images: list[str] = []
    values: dict[str, Any] = {}
    texts: list[tuple[str, str]] = []
    form = await _parse(request)
    try:
        for name, part in form.multi_items():
            kind = FILES.get(name)
            if isinstance(part, str) and kind is None:
                texts.append((name, part))
                continue
            source = part if isinstance(part, str) else await _file(name, part)
            if kind == "mask":
                values["mask"] = source
            else:
                images.append(source)
    finally:
        await form.close()
    values |= _values(texts)
    names = _place(images, values)
    return EditForm(_validated(values, names), names)


async def _parse(request: Request) -> FormData:
    if media_type(request.headers) != "multipart/form-data":
        raise InvalidRequest("content-type: send multipart/form-data", field="content-type")
    parser = _BoundedParser(
        request.headers,
        request.stream(),
        max_files=MAX_FILES,
        max_fields=MAX_FIELDS,
        max_part_size=MAX_TEXT,
    )
    try:
        return await parser.parse()
    except MultiPartException as error:
        raise InvalidRequest(f"the form cannot be read: {error.message}") from error
    except ClientDisconnect as error:
        raise Cancelled("the caller hung up") from error


class _BoundedParser(MultiPartParser):
    """Ends at the first byte too many of a file."""

    def on_part_begin(self) -> None:
        """Count from 0."""
        self._size = 0
        super().on_part_begin()

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        """Raises RequestTooLarge."""
        self._size += end - start
        if self._size > MAX_BYTES:
            name = self._current_part.field_name[:80]
            raise RequestTooLarge(f"{name}: {MAX_BYTES} bytes are the most", field=name)
        super().on_part_data(data, start, end)


async def _file(name: str, file: UploadFile) -> str:
    if name in REFUSED:
        raise refusal(name)
    if name not in FILES:
        raise InvalidRequest(
            f"{name[:80]}: is no file here; send image, image[] or mask", field=name[:80]
        )
    if not (data := await file.read()):
        raise InvalidRequest(f"{name}: the file is empty", field=name)
    return base64.b64encode(data).decode()


def _place(images: list[str], values: dict[str, Any]) -> dict[str, str]:
    """Put `images` into `values` as klein's fields; the caller's names of these."""
    for field in FILLED_IN:
        if field in values:
            raise InvalidRequest(f"{field}: send images as image or image[] here", field=field)
    if not images:
        raise InvalidRequest("image: send the image to edit, as a file", field="image")
    if len(images) > MAX_IMAGES:
        raise InvalidRequest(f"image: {MAX_IMAGES} are the most", field="image")
    names = {}
    first = int(any(values.get(field) is not None for field in STARTS_FROM_FIRST))
    if first:
        values["init_image"] = images[0]
        names["init_image"] = "image[0]"
    values["images"] = images[first:]
    for number in range(first, len(images)):
        names[f"images.{number - first}"] = f"image[{number}]"
    return names


def _validated(values: dict[str, Any], names: dict[str, str]) -> ImageRequest:
    try:
        return ImageRequest.model_validate(values)
    except ValidationError as error:
        fault = invalid(error.errors(include_url=False, include_input=False))
        raise renamed(fault, names) from error


# -- texts to values -------------------------------------------------------------------------------


def _values(texts: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """`a`, `a[]`, `a[b]` and `a[][b]` as values, lists and objects, typed by the schema."""
    found: dict[str, dict[tuple[bool, str], list[str]]] = {}
    for name, text in texts:
        match = _NAME.fullmatch(name)
        if match is None:
            raise InvalidRequest(f"{name[:80]!r} is no name of a field", field=name[:80])
        key, many, part = match.groups()
        found.setdefault(key, {}).setdefault((bool(many), part or ""), []).append(text)
    properties = _SCHEMA["properties"]
    return {
        key: _typed(_joined(key, parts), properties.get(key, {})) for key, parts in found.items()
    }


def _joined(key: str, parts: dict[tuple[bool, str], list[str]]) -> Any:
    """The one text, list, object or list of objects that the parts of `key` are."""
    many = {many for many, _ in parts}
    lengths = {len(texts) for texts in parts.values()}
    columns = {part: texts for (_, part), texts in parts.items()}
    if len(many) > 1 or len(lengths) > 1 or ("" in columns and len(columns) > 1):
        raise InvalidRequest(f"{key}: its parts do not fit together; send it as JSON", field=key)
    if many == {False} and lengths != {1}:
        raise InvalidRequest(f"{key}: is there more than once", field=key)
    if "" in columns:
        return columns[""] if True in many else columns[""][0]
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return rows if True in many else rows[0]


def _typed(value: Any, schema: dict[str, Any]) -> Any:
    """`value` with every text that the schema does not want as text read as JSON."""
    options = [_resolved(each) for each in schema.get("anyOf", [schema])]
    kinds = {each.get("type"): each for each in options}
    if isinstance(value, str):
        return value if "string" in kinds else _json(value)
    if isinstance(value, list):
        items = kinds.get("array", {}).get("items", {})
        return [_typed(each, items) for each in value]
    properties = kinds.get("object", {}).get("properties", {})
    return {key: _typed(each, properties.get(key, {})) for key, each in value.items()}


def _resolved(schema: dict[str, Any]) -> dict[str, Any]:
    name = schema.get("$ref", "").removeprefix("#/$defs/")
    found: dict[str, Any] = _SCHEMA["$defs"][name] if name else schema
    return found


def _json(text: str) -> Any:
    """A number, a switch, an object; what is no JSON stays text, which the schema then refuses."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
