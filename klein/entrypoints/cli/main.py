"""The command line: `klein generate|presets|show|lora|weights|serve|doctor`.

Each command's module is imported when it is asked for, so that help is quick.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from klein import __version__, logs
from klein.entrypoints.cli.exit_codes import INTERRUPTED, OK, exit_code
from klein.errors import KleinError

Run = Callable[[argparse.Namespace], int]


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parser(argv).parse_args(argv)
    logs.setup(os.environ)
    run: Run = args.run
    try:
        return run(args)
    except KleinError as error:
        logs.say(f"klein: {error}")
        return exit_code(error.code)
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser(argv: list[str] | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="klein",
        description="Draw with FLUX.2-klein and LoRAs. MODEL_ID names the model; "
        "MODEL_ID=nano is the built-in one, which needs no GPU.",
    )
    parser.add_argument("--version", action="version", version=f"klein {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    generate = commands.add_parser("generate", help="draw an image", description="Draw an image.")
    if "generate" in (sys.argv[1:] if argv is None else argv):
        from klein.entrypoints.cli.generate import add_flags

        add_flags(generate)
    generate.set_defaults(run=_generate)
    presets = commands.add_parser("presets", help="list the presets")
    presets.set_defaults(run=_presets)
    show = commands.add_parser("show", help="print the parameters inside an image")
    show.add_argument("file", type=Path)
    show.set_defaults(run=_show)
    _add_lora_commands(
        commands.add_parser("lora", help="list, inspect, add, remove, convert, extract")
    )
    _add_weights_commands(commands.add_parser("weights", help="list, fetch, pack"))
    serve = commands.add_parser("serve", help="serve from several GPUs of this machine, by Ray")
    serve.add_argument("--replicas", type=int, help="one GPU each (default: as many as there are)")
    serve.add_argument("--host", default="0.0.0.0", help="address to listen on")  # noqa: S104
    serve.add_argument("--port", type=int, default=3000, help="port to listen on")
    serve.set_defaults(run=_serve)
    doctor = commands.add_parser("doctor", help="what this machine can run, and what is missing")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_lora_commands(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    rows = commands.add_parser("list", help="every LoRA at hand")
    rows.set_defaults(run=_command("lora", "list_loras"))
    inspect = commands.add_parser("inspect", help="what a .safetensors file is")
    inspect.add_argument("file", type=Path)
    inspect.set_defaults(run=_command("lora", "inspect"))
    add = commands.add_parser("add", help="copy a LoRA into KLEIN_LORA_DIR")
    add.add_argument("path", help="a file, owner/repo, https address or civitai:VERSION")
    add.add_argument("--name", help="file name to give it")
    add.add_argument("--weight-name", help="which file of a Hub repository")
    add.add_argument("--revision", help="commit, tag or branch of a Hub repository")
    add.set_defaults(run=_command("lora", "add"))
    remove = commands.add_parser("remove", help="delete a LoRA from KLEIN_LORA_DIR")
    remove.add_argument("name")
    remove.set_defaults(run=_command("lora", "remove"))
    convert = commands.add_parser("convert", help="write a file in diffusers' format")
    convert.add_argument("file", type=Path)
    convert.add_argument("output", type=Path)
    convert.set_defaults(run=_command("lora", "convert"))
    extract = commands.add_parser("extract", help="write the difference of two models as a LoRA")
    extract.add_argument("model", help="a transformer's .safetensors file, or a model's folder")
    extract.add_argument("base", help="the same, of the model that the LoRA is for")
    extract.add_argument("--rank", type=int, default=128, help="128 unless given, at most 512")
    extract.add_argument("-o", "--output", type=Path, required=True)
    extract.set_defaults(run=_command("lora", "extract"))


def _add_weights_commands(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    rows = commands.add_parser("list", help="which models are on this machine, and where")
    rows.set_defaults(run=_command("weights", "list_weights"))
    fetch = commands.add_parser("fetch", help="fetch what MODEL_ID and KLEIN_TRANSFORMER name")
    fetch.set_defaults(run=_command("weights", "fetch"))
    pack = commands.add_parser("pack", help="write the model as klein reads it fastest")
    pack.add_argument("folder", metavar="DIR", type=Path, help="a new folder, for MODEL_ID")
    pack.add_argument(
        "--numbers",
        choices=("float8", "bfloat16"),
        default="float8",
        help="float8 (the default) for fast and turbo, bfloat16 for every tier",
    )
    pack.set_defaults(run=_command("weights", "pack"))


def _generate(args: argparse.Namespace) -> int:
    from klein.entrypoints.cli.generate import generate

    return generate(args)


def _command(module: str, name: str) -> Run:
    def run(args: argparse.Namespace) -> int:
        found = importlib.import_module(f"klein.entrypoints.cli.{module}")
        command: Run = getattr(found, name)
        return command(args)

    return run


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
    from klein.entrypoints.cli.generate import read_bytes
    from klein.output.images import read_text

    print(read_text(read_bytes(args.file)))
    return OK


def _serve(args: argparse.Namespace) -> int:
    from klein.entrypoints.cli.serve import serve

    return serve(args)


def _doctor(args: argparse.Namespace) -> int:
    from klein.entrypoints.cli.doctor import doctor

    return doctor()
