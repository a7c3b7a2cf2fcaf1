"""`klein generate`: draw from the command line."""

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from klein.app import build
from klein.app.generator import Generated, Generator
from klein.core import Progress
from klein.entrypoints.cli.exit_codes import OK
from klein.errors import InvalidRequest
from klein.output import images, metadata, response
from klein.request.formats import FORMAT_ALIASES, FORMATS
from klein.request.schema import GenerateRequest, parse
from klein.settings import Settings


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
    properties = GenerateRequest.model_json_schema()["properties"]
    for name, field in fields.items():
        if name != "prompt":
            placeholder = "JSON" if name == "loras" else name.split("_")[-1].upper()
            flag = "--" + name.replace("_", "-")
            text = f"{field.description}{_choices(properties[name])}"
            parser.add_argument(flag, dest=name, metavar=placeholder, help=text)


def generate(args: argparse.Namespace) -> int:
    """Draw what the flags ask for and write the files."""
    request = _request(args)
    settings = Settings.from_env(os.environ)
    load = build.loader(settings, os.environ)
    print(f"loading {settings.model_id}", file=sys.stderr)
    generator = build.generator(settings, load)
    try:
        generator.engine.wait_ready()
        generated = _run(generator, request)
    finally:
        generator.stop()
    _write(generated, args.output)
    for warning in generated.result.warnings:
        print(f"note: {warning}", file=sys.stderr)
    return OK


def read_bytes(path: Path) -> bytes:
    """The file's bytes; raises InvalidRequest."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read ({error.strerror})") from error


def parse_lora(text: str) -> dict[str, Any]:
    """`PATH` or `PATH:SCALE` as a LoRA of a request."""
    path, colon, scale = text.rpartition(":")
    try:
        return {"path": path, "scale": float(scale)} if colon else {"path": text}
    except ValueError:
        return {"path": text}


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
        if name != "loras":
            return text  # refused by the request, with its bounds
        raise InvalidRequest("loras: not JSON; --lora PATH:SCALE is simpler") from error


def _request(args: argparse.Namespace) -> GenerateRequest:
    """The image named by --like, then the flags, then the format that the file's name says."""
    values: dict[str, Any] = {}
    if args.like:
        like = metadata.from_text(images.read_text(read_bytes(args.like)))
        values = like.model_dump(exclude_none=True)
    flags, properties = vars(args), GenerateRequest.model_json_schema()["properties"]
    given = {
        name: _value(name, flags[name], schema)
        for name, schema in properties.items()
        if flags[name] is not None
    }
    if args.lora:
        given["loras"] = [*given.get("loras", []), *map(parse_lora, args.lora)]
    given["output_format"] = _format(args.output, given.get("output_format"))
    if "prompt" not in values | given:
        raise InvalidRequest("prompt: say what to draw", field="prompt")
    return parse(values | given)


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


def _run(generator: Generator, request: GenerateRequest) -> Generated:
    params = generator.resolve(request).params
    steps = params.num_inference_steps * params.num_images
    print(f"drawing {params.width}×{params.height} in {steps} steps", file=sys.stderr)
    bar = tqdm(total=steps, unit="step", leave=False, disable=None)

    def on_progress(progress: Progress) -> None:
        if progress.stage == "fetch":
            bar.set_description(f"fetching a LoRA, {progress.step / 1e6:.0f} MB")
        else:
            bar.set_description(refresh=False)
            bar.update()

    with bar:
        return asyncio.run(generator.run(request, generator.context(on_progress=on_progress)))


def _write(generated: Generated, output: Path) -> None:
    encoded = response.encode(generated.result, generated.delivery)
    for image in encoded:
        name = output
        if len(encoded) > 1:
            name = output.with_stem(f"{output.stem}-{image.seed}")
        try:
            name.write_bytes(image.data)
        except OSError as error:
            raise InvalidRequest(f"output: {name} cannot be written ({error.strerror})") from error
        print(f"{name}  seed {image.seed}  {generated.result.timings.total:.1f} s")
