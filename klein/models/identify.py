"""Which model a MODEL_ID, a folder or a configuration is."""

import json
from collections.abc import Callable
from pathlib import Path

from klein.errors import ModelUnavailable, unknown
from klein.models import catalog
from klein.models.catalog import ModelSpec
from klein.models.locate import Found

NANO_FOLDER = Path(__file__).parents[1] / "nano"

LOCAL = "a local folder"

ReadConfig = Callable[[str], dict[str, object]]
"""File name in the model's repository or folder → its JSON."""


def local(model_id: str) -> Found | None:
    """The local folder `model_id` names, or None for a Hub id."""
    if model_id == "nano":
        return Found("the built-in model", NANO_FOLDER / "model", None)
    path = Path(model_id).expanduser()
    if path.is_dir():
        return Found(LOCAL, path, None)
    if catalog.known(model_id):
        return None
    if model_id.startswith((".", "/", "~")) or model_id.count("/") != 1:
        raise ModelUnavailable(
            f"MODEL_ID: there is no folder {model_id!r}; "
            f"{unknown('model', model_id, list(catalog.MODELS))}",
            field="MODEL_ID",
        )
    return None


def folder_reader(folder: Path) -> ReadConfig:
    """Reads the JSON files of a model folder; what it gives raises ModelUnavailable."""

    def read(name: str) -> dict[str, object]:
        try:
            return dict(json.loads((folder / name).read_text()))
        except (OSError, ValueError) as error:
            raise ModelUnavailable(
                f"MODEL_ID: {folder.name!r} is not a diffusers model folder: "
                f"{name} is missing or damaged",
                field="MODEL_ID",
            ) from error

    return read


def identify(read: ReadConfig) -> ModelSpec:
    """The row of a model that is not known by name, from its own configuration."""
    index = read("model_index.json")
    if index.get("_class_name") not in ("Flux2KleinPipeline", None):
        raise ModelUnavailable(
            f"this model is a {index['_class_name']}; klein serves Flux2KleinPipeline",
            field="MODEL_ID",
        )
    config = read("transformer/config.json")

    def number(name: str) -> int:
        return int(str(config[name]))

    try:
        hidden = number("num_attention_heads") * number("attention_head_dim")
        blocks = number("num_layers"), number("num_single_layers")
    except (KeyError, ValueError) as error:
        raise ModelUnavailable(
            "transformer/config.json is not that of a FLUX.2 model", field="MODEL_ID"
        ) from error
    return catalog.by_geometry(hidden, *blocks, bool(index.get("is_distilled", False)))
