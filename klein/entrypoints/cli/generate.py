"""`klein generate`: draw from the command line."""

import argparse
import asyncio
import base64
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from klein import logs
from klein.core import InputInfo, Progress
from klein.entrypoints.cli.exit_codes import OK
from klein.errors import InvalidRequest
from klein.models import schedule
from klein.output import images, metadata, response
from klein.request import images as inputs
from klein.request.formats import FORMAT_ALIASES, FORMATS
from klein.request.schema import GenerateRequest, parse
from klein.settings import Settings
from klein.sources.reference import SUFFIX

if TYPE_CHECKING:
    from klein.app.generator import Generated, Generator

JSON_FIELDS = ("loras", "images", "extend")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for every field of a request, from the model itself."""
    fields = GenerateRequest.model_fields
    parser.add_argument("prompt", nargs="?", help=fields["prompt"].description)
    parser.add_argument("-o", "--output", type=Path, required=True, help="file to write")
    parser.add_argument(
        "--like", type=Path, metavar="FILE", help="take every value not given from this image"
    )
    parser.add_argument(
        "--lora",
        action="append",
        metavar="PATH[:SCALE]",
        help="a LoRA, as often as wanted: zibbo.safetensors:0.8",
    )
    parser.add_argument(
        "--image",
        action="append",
        metavar="PATH",
        help="a reference, a file or an address, as often as wanted",
    )
    properties = GenerateRequest.model_json_schema()["properties"]
    for name, field in fields.items():
        if name != "prompt":
            placeholder = "JSON" if name in JSON_FIELDS else name.split("_")[-1].upper()
            flag = "--" + name.replace("_", "-")
            text = f"{field.description}{_choices(properties[name])}"
            parser.add_argument(flag, dest=name, metavar=placeholder, help=text)


def generate(args: argparse.Namespace) -> int:
    """Draw what the flags ask for and write the files."""
    request = _request(args)
    settings = Settings.from_env(os.environ)
    from klein.app import build  # help needs none of it

    load = build.loader(settings, os.environ)
    logs.say(f"loading {settings.model_id}", logging.INFO)
    generator = build.generator(settings, load)
    try:
        generator.engine.wait_ready()
        generated = _run(generator, request)
    finally:
        generator.stop()
    others = _other_loras(args.like, generated)  # before the output is written over it
    _write(generated, args.output)
    for warning in (*generated.result.warnings, *others):
        logs.say(f"note: {warning}", logging.WARNING)
    return OK


def _other_loras(like: Path | None, generated: "Generated") -> list[str]:
    """A sentence for each LoRA whose file is not the one that acted on the image of --like."""
    if like is None:
        return []
    recorded = metadata.lora_hashes(images.read_text(read_bytes(like)))
    return [
        f"LoRA {one.path} is not the file that {like.name} was made with"
        for one in generated.result.loras
        if one.applied and one.sha256 != recorded.get(one.path, one.sha256)
    ]


def read_bytes(path: Path) -> bytes:
    """The file's bytes; raises InvalidRequest."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read ({error.strerror})") from error


def parse_lora(text: str) -> dict[str, Any]:
    """`PATH` or `PATH:SCALE` as a LoRA of a request; raises InvalidRequest for another SCALE.

    A colon inside an address or a file's name, or of `civitai:VERSION`, begins no scale.
    """
    path, colon, scale = text.rpartition(":")
    if not colon or path == "civitai" or "/" in scale or scale.endswith(SUFFIX):
        return {"path": text}
    try:
        return {"path": path, "scale": float(scale)}
    except ValueError as error:
        raise InvalidRequest(
            f"lora: {scale!r} after {path!r} is no number: write --lora PATH:0.8, or PATH alone "
            "for its own scale",
            field="loras",
        ) from error


def _options(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """A field's schema and every alternative inside it."""
    options = [schema, *schema.get("anyOf", ())]
    return options + [inner for option in options[1:] for inner in option.get("anyOf", ())]


def _choices(schema: dict[str, Any]) -> str:
    """The names a field takes, for its help."""
    names = [name for option in _options(schema) for name in option.get("enum", ())]
    return f" ({', '.join(names)})" if names else ""


def _value(name: str, text: str, schema: dict[str, Any]) -> Any:
    """A flag's text as JSON would have it, where the field takes no text."""
    if any(option.get("type") == "string" for option in _options(schema)):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        if name not in JSON_FIELDS:
            return text  # refused by the request, with its bounds
        simpler = {"loras": "--lora PATH:SCALE is simpler", "images": "--image PATH is simpler"}
        way_out = simpler.get(name, """write '{"left": 256}'""")
        raise InvalidRequest(f"{name}: not JSON; {way_out}", field=name) from error


def _request(args: argparse.Namespace) -> GenerateRequest:
    """The image named by --like, then the flags, then the format that the file's name says."""
    values: dict[str, Any] = {}
    recorded: dict[str, InputInfo] = {}
    if args.like:
        text = images.read_text(read_bytes(args.like))
        values = metadata.from_text(text).model_dump(exclude_none=True)
        recorded = metadata.inputs_of(text)
    flags, properties = vars(args), GenerateRequest.model_json_schema()["properties"]
    given = {
        name: _value(name, flags[name], schema)
        for name, schema in properties.items()
        if flags[name] is not None
    }
    if args.lora:
        given["loras"] = [*given.get("loras", []), *map(parse_lora, args.lora)]
    if args.image:
        given["images"] = [*given.get("images", []), *args.image]
    _read_pictures(given)
    given["output_format"] = _format(args.output, given.get("output_format"))
    if "prompt" not in values | given:
        raise InvalidRequest("prompt: say what to draw", field="prompt")
    request = parse(values | given)
    _compare(args.like, recorded, request)
    return request


def _read_pictures(given: dict[str, Any]) -> None:
    """Put the bytes of local files in the place of their paths."""
    for name in ("init_image", "mask"):
        if name in given:
            given[name] = _source(name, given[name])
    if isinstance(named := given.get("images"), list):
        given["images"] = [_source(f"images.{n}", str(each)) for n, each in enumerate(named)]


def _source(field: str, text: str) -> str:
    """An address or a data URI as it is; a file as base64."""
    if inputs.is_address(text) or text.startswith("data:"):
        return text
    path = Path(text)
    if path.is_file() and path.stat().st_size > inputs.MAX_BYTES:
        raise InvalidRequest(f"{field}: {path} has more than {inputs.MAX_BYTES} bytes", field=field)
    return base64.b64encode(read_bytes(path)).decode()


def _compare(like: Path, recorded: dict[str, InputInfo], request: GenerateRequest) -> None:
    """Refuse to draw again without the pictures that it was made of; warn of other ones."""
    pictures = {f"images.{n}": source for n, source in enumerate(request.images)}
    pictures |= {"init_image": request.init_image or "", "mask": request.mask or ""}
    missing = [field for field in recorded if not pictures.get(field)]
    if missing:
        named = ", ".join(_describe(field, recorded[field]) for field in missing)
        raise InvalidRequest(
            f"{like.name} was made of pictures that are not inside it; give {named}",
            field=missing[0],
        )
    for field, info in recorded.items():
        source = pictures[field]
        if inputs.is_address(source):
            logs.say(f"note: {field} is an address, which was not compared", logging.WARNING)
        elif hashlib.sha256(inputs.from_text(source, field)).hexdigest() != info.sha256:
            logs.say(f"note: {field} is not the picture {like.name} was made of", logging.WARNING)


def _describe(field: str, info: InputInfo) -> str:
    name, _, index = field.partition(".")
    flag = f"--image (image {int(index) + 1})" if index else "--" + name.replace("_", "-")
    return f"{flag}: {info.width}×{info.height}, sha256 {info.sha256[:12]}…"


def _format(output: Path, asked: str | None) -> str:
    by_extension = {row.extension: name for name, row in FORMATS.items()} | {"jpeg": "jpeg"}
    named = by_extension.get(output.suffix.lower().removeprefix("."))
    if named is None:
        raise InvalidRequest(f"output: name a file that ends in .{', .'.join(by_extension)}")
    if not output.parent.is_dir():
        raise InvalidRequest(f"output: there is no folder {str(output.parent)!r}")
    if asked and FORMAT_ALIASES.get(asked, asked) != named:
        raise InvalidRequest(f"output_format: {asked!r}, but {output.name} says {named!r}")
    return named


def _run(generator: "Generator", request: GenerateRequest) -> "Generated":
    params = generator.resolve(request).params
    skipped = schedule.first_step(params.num_inference_steps, params.strength)
    steps = (params.num_inference_steps - skipped) * params.num_images
    logs.say(f"drawing in {steps} steps", logging.INFO)
    bar = tqdm(total=steps, unit="step", leave=False, disable=logs.is_json() or None)

    def on_progress(progress: Progress) -> None:
        if progress.stage == "fetch":
            bar.set_description(f"fetching a LoRA, {progress.step / 1e6:.0f} MB")
        else:
            bar.set_description(refresh=False)
            bar.update()

    with bar:
        return asyncio.run(generator.run(request, generator.context(on_progress=on_progress)))


def _write(generated: "Generated", output: Path) -> None:
    encoded = response.encode(generated.result, generated.delivery, generated.marks)
    for image in encoded:
        name = output
        if len(encoded) > 1:
            name = output.with_stem(f"{output.stem}-{image.seed}")
        try:
            name.write_bytes(image.data)
        except OSError as error:
            raise InvalidRequest(f"output: {name} cannot be written ({error.strerror})") from error
        print(f"{name}  seed {image.seed}  {generated.result.timings.total:.1f} s")
