"""The command line: `python -m klein generate|presets|show|lora|doctor`."""

import argparse
import os
import secrets
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never

from klein import __version__
from klein.errors import ErrorCode, InvalidRequest, KleinError

if TYPE_CHECKING:
    from klein.core import GenerationResult, Job
    from klein.engine.engine import Engine
    from klein.lora.library import LoraLibrary
    from klein.request.schema import GenerateRequest
    from klein.settings import Settings

OK, CALLERS_FAULT, BROKEN, TRY_AGAIN, INTERRUPTED = 0, 2, 70, 75, 130


def exit_code(code: ErrorCode) -> int:
    """The exit code of each error; a new code does not type-check until it has one."""
    match code:
        case ErrorCode.INVALID_REQUEST | ErrorCode.LORA_FAILED | ErrorCode.BAD_SETTING:
            return CALLERS_FAULT
        case ErrorCode.MODEL_UNAVAILABLE | ErrorCode.INTERNAL | ErrorCode.OUTPUT_TOO_LARGE:
            return BROKEN
        case ErrorCode.NOT_READY | ErrorCode.QUEUE_FULL | ErrorCode.DEADLINE_EXCEEDED:
            return TRY_AGAIN
        case ErrorCode.OUT_OF_MEMORY | ErrorCode.DELIVERY_FAILED:
            return TRY_AGAIN
        case ErrorCode.CANCELLED:
            return INTERRUPTED
    assert_never(code)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parser(argv).parse_args(argv)
    try:
        code: int = args.run(args)
        return code
    except KleinError as error:
        print(f"klein: {error}", file=sys.stderr)
        return exit_code(error.code)
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser(argv: list[str] | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m klein",
        description="Draw with FLUX.2-klein and LoRAs. MODEL_ID names the model; "
        "MODEL_ID=nano is the built-in one, which needs no GPU.",
    )
    parser.add_argument("--version", action="version", version=f"klein {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    generate = commands.add_parser("generate", help="draw a picture", description="Draw a picture.")
    if "generate" in (sys.argv[1:] if argv is None else argv):
        _add_request_flags(generate)
    generate.set_defaults(run=_generate)
    presets = commands.add_parser("presets", help="list the presets")
    presets.set_defaults(run=_presets)
    show = commands.add_parser("show", help="print the parameters inside a picture")
    show.add_argument("file", type=Path)
    show.set_defaults(run=_show)
    _add_lora_commands(commands.add_parser("lora", help="list, inspect, add, remove, convert"))
    doctor = commands.add_parser("doctor", help="what this machine can run, and what is missing")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_request_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for every field of a request, from the model itself."""
    from klein.request.schema import GenerateRequest

    fields = GenerateRequest.model_fields
    parser.add_argument("prompt", nargs="?", help=fields["prompt"].description)
    parser.add_argument("-o", "--output", type=Path, required=True, help="file to write")
    parser.add_argument(
        "--like", type=Path, metavar="FILE", help="take every value not given from this picture"
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
            shown = "JSON" if name == "loras" else name.split("_")[-1].upper()
            flag = "--" + name.replace("_", "-")
            text = f"{field.description}{_choices(properties[name])}"
            parser.add_argument(flag, dest=name, metavar=shown, help=text)


def _choices(schema: dict[str, Any]) -> str:
    """The names a field takes, for its help."""
    options = [schema, *schema.get("anyOf", ())]
    options += [inner for option in options[1:] for inner in option.get("anyOf", ())]
    names = [name for option in options for name in option.get("enum", ())]
    return f" ({', '.join(names)})" if names else ""


def _add_lora_commands(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    rows = commands.add_parser("list", help="every LoRA at hand")
    rows.set_defaults(run=_lora_list)
    inspect = commands.add_parser("inspect", help="what a .safetensors file is")
    inspect.add_argument("file", type=Path)
    inspect.set_defaults(run=_lora_inspect)
    add = commands.add_parser("add", help="copy a LoRA into KLEIN_LORA_DIR")
    add.add_argument("path", help="a file, owner/repo, https address or civitai:VERSION")
    add.add_argument("--name", help="file name to give it")
    add.add_argument("--weight-name", help="which file of a Hub repository")
    add.add_argument("--revision", help="commit, tag or branch of a Hub repository")
    add.set_defaults(run=_lora_add)
    remove = commands.add_parser("remove", help="delete a LoRA from KLEIN_LORA_DIR")
    remove.add_argument("name")
    remove.set_defaults(run=_lora_remove)
    convert = commands.add_parser("convert", help="write a file in diffusers' format")
    convert.add_argument("file", type=Path)
    convert.add_argument("output", type=Path)
    convert.set_defaults(run=_lora_convert)


def _generate(args: argparse.Namespace) -> int:
    request = _request(args)
    from klein.settings import Settings

    settings = Settings.from_env(os.environ)
    engine = _start(settings)
    try:
        result = _run(engine, request, settings)
    finally:
        engine.stop()
    _write(result, args.output)
    for warning in result.warnings:
        print(f"note: {warning}", file=sys.stderr)
    return OK


def _request(args: argparse.Namespace) -> "GenerateRequest":
    """The picture named by --like, then the flags, then the format that the file's name says."""
    from klein.output import images, metadata
    from klein.request.schema import GenerateRequest, parse

    values: dict[str, Any] = {}
    if args.like:
        like = metadata.from_text(images.read_text(_bytes(args.like)))
        values = like.model_dump(exclude_none=True)
    flags = vars(args)
    given = {n: flags[n] for n in GenerateRequest.model_fields if flags[n] is not None}
    if "loras" in given:
        given["loras"] = _json(given["loras"])
    if args.lora:
        given["loras"] = [*given.get("loras", []), *map(_lora, args.lora)]
    given["output_format"] = _format(args.output, given.get("output_format"))
    if "prompt" not in values | given:
        raise InvalidRequest("prompt: say what to draw", field="prompt")
    return parse(values | given)


def _format(output: Path, asked: str | None) -> str:
    from klein.request.formats import FORMAT_ALIASES, FORMATS

    by_extension = {row.extension: name for name, row in FORMATS.items()} | {"jpeg": "jpeg"}
    named = by_extension.get(output.suffix.lower().removeprefix("."))
    if named is None:
        raise InvalidRequest(f"output: name a file that ends in .{', .'.join(by_extension)}")
    if not output.parent.is_dir():
        raise InvalidRequest(f"output: there is no folder {str(output.parent)!r}")
    if asked and FORMAT_ALIASES.get(asked, asked) != named:
        raise InvalidRequest(f"output_format: {asked!r}, but {output.name} says {named!r}")
    return named


def _json(text: str) -> Any:
    import json

    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidRequest("loras: not JSON; --lora PATH:SCALE is simpler") from error


def _lora(text: str) -> dict[str, Any]:
    path, colon, scale = text.rpartition(":")
    try:
        return {"path": path, "scale": float(scale)} if colon else {"path": text}
    except ValueError:
        return {"path": text}


def _start(settings: "Settings") -> "Engine":
    from klein.app import build as startup
    from klein.engine.engine import Engine

    load = startup.loader(settings, os.environ)
    print(f"loading {settings.model_id}", file=sys.stderr)
    engine = Engine(load, queue_size=1).start()
    engine.wait_ready()
    return engine


def _run(engine: "Engine", request: "GenerateRequest", settings: "Settings") -> "GenerationResult":
    from tqdm import tqdm

    from klein.core import Job, Progress
    from klein.request.resolve import resolve

    spec = engine.pipeline.info.spec
    resolved = resolve(
        request,
        spec,
        lambda: secrets.randbelow(2**32),
        prompt_loras=settings.prompt_loras,
    )
    params = resolved.params
    steps = params.num_inference_steps * params.num_images
    print(f"drawing {params.width}×{params.height} in {steps} steps", file=sys.stderr)
    bar = tqdm(total=steps, unit="step", leave=False, disable=None)

    def on_progress(progress: Progress) -> None:
        if progress.stage == "fetch":
            bar.set_description(f"fetching a LoRA, {progress.step / 1e6:.0f} MB")
        else:
            bar.set_description(refresh=False)
            bar.update()

    job = Job(
        params, time.monotonic() + settings.timeout, resolved.warnings, on_progress=on_progress
    )
    try:
        return _wait(engine, job)
    finally:
        bar.close()


def _wait(engine: "Engine", job: "Job") -> "GenerationResult":
    future = engine.submit(job)
    try:
        return future.result()
    except KeyboardInterrupt:
        engine.cancel(job)
        raise


def _write(result: "GenerationResult", output: Path) -> None:
    from klein.output import response as render

    pictures = render.encode(result)
    for picture in pictures:
        name = output
        if len(pictures) > 1:
            name = output.with_stem(f"{output.stem}-{picture.seed}")
        try:
            name.write_bytes(picture.data)
        except OSError as error:
            raise InvalidRequest(f"output: {name} cannot be written ({error.strerror})") from error
        print(f"{name}  seed {picture.seed}  {result.timings['total']:.1f} s")


def _presets(args: argparse.Namespace) -> int:
    from klein.request.presets import DEFAULT_PRESET, PRESETS

    for preset in PRESETS.values():
        default = "  (default)" if preset.name == DEFAULT_PRESET else ""
        print(
            f"{preset.name:<24}{preset.num_inference_steps:>3} steps  guidance "
            f"{preset.guidance_scale:g}  {preset.width}×{preset.height}  schedule "
            f"{preset.schedule:<11} {preset.purpose}{default}"
        )
    return OK


def _show(args: argparse.Namespace) -> int:
    from klein.output import images

    print(images.read_text(_bytes(args.file)))
    return OK


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read ({error.strerror})") from error


def _library() -> "LoraLibrary":
    from klein.app import build as startup
    from klein.settings import Settings

    return startup.library(Settings.from_env(os.environ))


def _lora_list(args: argparse.Namespace) -> int:
    for row in _library().entries():
        words = ", ".join(row.get("trigger_words", ()))
        facts = row.get("error") or f"{row['format']}, rank {row['rank']}, for {row['base']}"
        size = f"{row['bytes'] / 1e6:.1f} MB"
        print(f"{row['name']:<32} {size:>10}  {facts}{f', trigger {words}' if words else ''}")
    return OK


def _lora_inspect(args: argparse.Namespace) -> int:
    import json

    from klein.lora import file
    from klein.lora.library import describe

    print(json.dumps(describe(file.inspect(args.file, args.file.name)), indent=2))
    return OK


def _lora_add(args: argparse.Namespace) -> int:
    from klein.lora.spec import LoraSpec

    local = Path(args.path)
    if local.is_file():
        with local.open("rb") as source:
            chunks = iter(lambda: source.read(1 << 20), b"")
            row = _library().add(args.name or local.name, chunks)
    else:
        spec = LoraSpec(args.path, weight_name=args.weight_name, revision=args.revision)
        row = _library().add_reference(spec, args.name, _show_bytes)
    print(f"{row['name']}: {row['format']}, rank {row['rank']}, for {row['base']}")
    return OK


def _show_bytes(have: int, total: int | None) -> None:
    of = f" of {total / 1e6:.0f}" if total else ""
    print(f"\r{have / 1e6:.0f}{of} MB", end="\n" if have == total else "", file=sys.stderr)


def _lora_remove(args: argparse.Namespace) -> int:
    _library().remove(args.name)
    return OK


def _lora_convert(args: argparse.Namespace) -> int:
    from klein.inference.adapters.convert import convert
    from klein.lora import file

    rank = convert(file.inspect(args.file, args.file.name), args.output)
    print(f"{args.output}: diffusers, rank {rank}")
    return OK


def _doctor(args: argparse.Namespace) -> int:
    from klein.entrypoints.cli import doctor
    from klein.models.machine import Machine
    from klein.settings import Settings

    print("\n".join(doctor.report(Settings.from_env(os.environ), Machine.probe(os.environ))))
    return OK


if __name__ == "__main__":
    sys.exit(main())
