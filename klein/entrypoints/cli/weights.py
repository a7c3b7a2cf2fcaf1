"""`klein weights`: list what is on this machine, fetch what is not, pack a model to start fast."""

import argparse
import os
import sys

from klein.entrypoints.cli.exit_codes import OK
from klein.errors import KleinError
from klein.models import locate
from klein.models.catalog import GB, MODELS
from klein.models.plan import Located, fetch_model, locate_model
from klein.settings import Settings


def list_weights(args: argparse.Namespace) -> int:
    """`weights list`: every model and where it is, then what the settings lead to."""
    for spec in MODELS.values():
        found = locate.find(spec.repo, None, locate.places()) if spec.repo else None
        where = f"{found.place}: {found.folder}" if found else "not on this machine"
        print(f"{spec.name:<14} {where if spec.repo else 'built in'}")
    settings = Settings.from_env(os.environ)
    try:
        model = locate_model(settings)
    except KleinError as error:
        print(f"MODEL_ID={settings.model_id}: {error}")
        return OK
    _print(settings, model)
    return OK


def fetch(args: argparse.Namespace) -> int:
    """`weights fetch`: bring what MODEL_ID and KLEIN_TRANSFORMER name to this machine."""
    settings = Settings.from_env(os.environ)
    _print(settings, fetch_model(locate_model(settings), settings, settings.model_revision))
    return OK


def pack(args: argparse.Namespace) -> int:
    """`weights pack`: write the model as klein reads it fastest."""
    settings = Settings.from_env(os.environ)
    model = fetch_model(locate_model(settings), settings, settings.model_revision)
    from klein.inference import pack as packing

    float8 = args.numbers == "float8"
    float8_text = float8 and settings.text_encoder != "bfloat16"
    parts = packing.pack(model, args.folder, float8=float8, float8_text=float8_text)
    for part in parts:
        print(f"{part.part:<14} {part.size / GB:6.2f} GB")
    total = sum(part.size for part in parts) / GB
    print(f"{args.folder}: {total:.2f} GB, for MODEL_ID")
    print(
        f"Its weights stay under their license ({model.spec.license}): keep the folder, and an "
        "image that holds it, where others cannot take it, unless that license lets you.",
        file=sys.stderr,
    )
    return OK


def _print(settings: Settings, model: Located) -> None:
    found = model.found
    where = f"{found.place}, {found.folder}" if found else "the Hub, to be fetched"
    print(f"MODEL_ID={settings.model_id}: {model.spec.name} from {where}")
    for note in model.notes:
        print(f"  {note}")
    if model.checkpoint and not model.checkpoint.files:
        print("  which is to be fetched")
