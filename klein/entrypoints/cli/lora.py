"""`klein lora`: list, inspect, add, remove, convert and extract LoRAs."""

import argparse
import json
import os
import sys
from pathlib import Path

from klein.app import build
from klein.entrypoints.cli.exit_codes import OK
from klein.errors import InvalidRequest, LoraError
from klein.lora import file
from klein.lora.file import LoraFile
from klein.lora.library import LoraLibrary, describe
from klein.lora.spec import LoraSpec
from klein.models import checkpoint
from klein.settings import Settings
from klein.sources.reference import SUFFIX

MAX_RANK = 512


def list_loras(args: argparse.Namespace) -> int:
    """`lora list`: every LoRA at hand, a line each."""
    for row in _library().entries():
        words = ", ".join(row.get("trigger_words", ()))
        facts = row.get("error") or f"{row['format']}, rank {row['rank']}, for {row['base']}"
        size = f"{row['bytes'] / 1e6:.1f} MB"
        print(f"{row['name']:<32} {size:>10}  {facts}{f', trigger {words}' if words else ''}")
    return OK


def inspect(args: argparse.Namespace) -> int:
    """`lora inspect`: what a file is, as JSON."""
    print(json.dumps(describe(_file(args.file)), indent=2))
    return OK


def add(args: argparse.Namespace) -> int:
    """`lora add`: copy a file, or what a reference names, into the folder."""
    local = Path(args.path)
    if local.is_file():
        with local.open("rb") as source:
            chunks = iter(lambda: source.read(1 << 20), b"")
            row = _library().add(args.name or local.name, chunks)
    else:
        spec = LoraSpec(args.path, weight_name=args.weight_name, revision=args.revision)
        row = _library().add_reference(spec, args.name, _print_bytes)
    print(f"{row['name']}: {row['format']}, rank {row['rank']}, for {row['base']}")
    return OK


def remove(args: argparse.Namespace) -> int:
    """`lora remove`: delete a LoRA of the folder."""
    _library().remove(args.name)
    return OK


def convert(args: argparse.Namespace) -> int:
    """`lora convert`: write any LoRA in diffusers' format."""
    found = _file(args.file)
    from klein.inference.adapters.convert import convert

    rank = convert(found, args.output)
    print(f"{args.output}: diffusers, rank {rank}")
    return OK


def extract(args: argparse.Namespace) -> int:
    """`lora extract`: what makes a base model draw as another, as a LoRA."""
    from klein.inference.adapters.extract import extract

    if not 1 <= args.rank <= MAX_RANK:
        raise InvalidRequest(f"rank: {args.rank} is not from 1 to {MAX_RANK}", field="rank")
    if args.output.suffix != SUFFIX or not args.output.parent.is_dir():
        raise InvalidRequest(f"output: name a {SUFFIX} file in a folder that is there")
    made = extract(checkpoint.at(args.model), checkpoint.at(args.base), args.rank, args.output)
    size = args.output.stat().st_size / 1e6
    print(f"{args.output}: {made.layers} layers, rank {args.rank}, {size:.1f} MB")
    print(
        f"{made.kept:.2%} of the difference's energy is in it; of {made.least_kept_layer} "
        f"{made.least_kept:.2%}, the least"
    )
    if made.norms_left_out:
        print(f"{made.norms_left_out} norms differ too, which no LoRA can hold", file=sys.stderr)
    print("It is derived from both models and stays under their licenses.", file=sys.stderr)
    return OK


def _file(path: Path) -> LoraFile:
    """The LoRA at `path`; raises LoraError where there is no file."""
    if not path.is_file():
        raise LoraError(
            f"{path} is no file here: give the path of a .safetensors file; `klein lora add` "
            "fetches others, `klein lora list` names those at hand"
        )
    return file.inspect(path, path.name)


def _print_bytes(have: int, total: int | None) -> None:
    of = f" of {total / 1e6:.0f}" if total else ""
    print(f"\r{have / 1e6:.0f}{of} MB", end="\n" if have == total else "", file=sys.stderr)


def _library() -> LoraLibrary:
    return build.library(Settings.from_env(os.environ))
