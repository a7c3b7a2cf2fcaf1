"""Which bytes a LoRA is: its format, rank, base model and the layers it changes."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from klein.errors import LoraError
from klein.lora import keys
from klein.models.layers import SWAPPED_HALVES, modules_by_layer
from klein.sources import safetensors as header

Shape = tuple[int, ...]

_KINDS: tuple[tuple[str, frozenset[str]], ...] = (
    ("lokr", frozenset({"lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a"})),
    ("loha", frozenset({"hada_w1_a"})),
    ("dora", frozenset({"magnitude"})),
    ("lora", frozenset({"down", "up"})),
    ("diff", frozenset({"diff"})),
)


@dataclass(frozen=True, slots=True)
class Patch:
    """What a file does to one of its layers.

    `modules` are the diffusers modules whose weights, stacked by rows, the layer is; `tensors`
    maps a part (`down`, `up`, `alpha`, …) to the tensor's name in the file.
    """

    layer: str
    modules: tuple[str, ...]
    kind: str
    tensors: Mapping[str, str]
    rank: int
    shape: tuple[int, int]
    swapped_halves: bool = False


WIDTHS = {
    192: "klein nano",
    3072: "FLUX.2-klein 4B",
    4096: "FLUX.2-klein 9B",
    6144: "FLUX.2-dev",
}
"""Transformer width → the models of that width."""


@dataclass(frozen=True, slots=True)
class LoraDefaults:
    """What an operator keeps beside a file: its own scale, its trigger word."""

    scale: float | None = None
    trigger: str | None = None


@dataclass(frozen=True, slots=True)
class LoraFile:
    """One LoRA on disk, known without loading it.

    `hidden` is the width of the model it was trained for, None where no layer shows it.
    `training` is what its metadata claims: base model, steps, software and the like.
    """

    path: Path
    name: str
    sha256: str
    format: str
    hidden: int | None
    patches: tuple[Patch, ...]
    trigger_words: tuple[str, ...]
    training: Mapping[str, str]
    defaults: LoraDefaults = LoraDefaults()

    @property
    def base(self) -> str:
        """The model it was trained for, by its shapes."""
        if self.hidden is None:
            return "unknown"
        return WIDTHS.get(self.hidden, "another model") + f" (width {self.hidden})"

    @property
    def trigger(self) -> str | None:
        """The word that calls it: the card's, else the first in its metadata."""
        return self.defaults.trigger or next(iter(self.trigger_words), None)

    @property
    def rank(self) -> int:
        """The largest rank in the file; 0 where the format has none."""
        return max(patch.rank for patch in self.patches)


def inspect(path: Path, name: str) -> LoraFile:
    """Read what `path` is; raises LoraError for a file that no klein model can use."""
    head = header.read(path)
    layers, prefixes, strangers = _group(head)
    if not layers:
        raise LoraError(f"LoRA {name!r} has none of a LoRA's tensors, only such as {_some(head)}")
    known = modules_by_layer()
    lost = [layer for layer in layers if layer not in known]
    if lost or strangers:
        raise LoraError(_foreign(name, lost, strangers, len(layers)))
    patches = tuple(
        _patch(name, layer, known[layer], parts, head.shapes) for layer, parts in layers.items()
    )
    return LoraFile(
        path=path,
        name=name,
        sha256=_sha256(path),
        format=_format(prefixes, layers, patches),
        hidden=_width(name, patches),
        patches=patches,
        trigger_words=_trigger_words(head.metadata),
        training=_training(head.metadata),
    )


def _group(head: header.Header) -> tuple[dict[str, dict[str, str]], Counter[str], list[str]]:
    layers: dict[str, dict[str, str]] = {}
    prefixes: Counter[str] = Counter()
    strangers = []
    for tensor in head.shapes:
        key = keys.take_apart(tensor)
        if key is None:
            strangers.append(tensor)
            continue
        prefixes[key.prefix] += 1
        layers.setdefault(key.layer, {})[key.part] = tensor
    return layers, prefixes, strangers


def _foreign(name: str, lost: list[str], strangers: list[str], total: int) -> str:
    unknown = [*lost, *strangers]
    guess = ""
    if any(mark in layer for layer in lost for mark in ("img_mod", "txt_mod", "proj_mlp")):
        guess = "; it looks like a LoRA for FLUX.1"
    elif any(x.startswith(("lora_te", "text_encoder", "te_")) for x in unknown):
        guess = "; it trains a text encoder, which klein LoRAs do not"
    return (
        f"LoRA {name!r} is not for FLUX.2: {len(unknown)} of its {total} layers do not exist "
        f"there, such as {unknown[0][:90]!r}{guess}"
    )


def _patch(
    name: str,
    layer: str,
    modules: tuple[str, ...],
    parts: dict[str, str],
    shapes: Mapping[str, Shape],
) -> Patch:
    kind = next((kind for kind, signs in _KINDS if signs & parts.keys()), None)
    if kind is None:
        raise LoraError(f"LoRA {name!r}: layer {layer!r} has only {', '.join(parts)}")
    if {"lokr_t2", "hada_t1", "hada_t2"} & parts.keys():
        raise LoraError(f"LoRA {name!r}: layer {layer!r} is in the convolution form of LyCORIS")
    own = {part: shapes[tensor] for part, tensor in parts.items()}
    try:
        rank, shape = _measure(kind, own)
    except (KeyError, ValueError) as error:
        raise LoraError(
            f"LoRA {name!r}: the tensors of layer {layer!r} do not fit together"
        ) from error
    return Patch(layer, modules, kind, parts, rank, shape, layer == SWAPPED_HALVES)


def _measure(kind: str, own: Mapping[str, Shape]) -> tuple[int, tuple[int, int]]:
    """Rank and (out, in) shape of the weight change that tensors of these shapes make."""
    if math.prod(own.get("alpha", ())) != 1:
        raise ValueError("alpha")
    if kind in ("lora", "dora"):
        (rank, columns), (rows, same) = own["down"], own["up"]
        if rank != same or math.prod(own.get("magnitude", (rows,))) != rows:
            raise ValueError(kind)
        return rank, (rows, columns)
    if kind == "diff":
        rows, columns = own["diff"]
        return 0, (rows, columns)
    if kind == "loha":
        (rows, rank), (same, columns) = own["hada_w1_a"], own["hada_w1_b"]
        if rank != same or own["hada_w2_a"][0] != rows or own["hada_w2_b"][1] != columns:
            raise ValueError(kind)
        return rank, (rows, columns)
    (rows1, columns1), rank1 = _factor("lokr_w1", own)
    (rows2, columns2), rank2 = _factor("lokr_w2", own)
    return max(rank1, rank2), (rows1 * rows2, columns1 * columns2)


def _factor(part: str, own: Mapping[str, Shape]) -> tuple[tuple[int, int], int]:
    if part in own:
        rows, columns = own[part]
        return (rows, columns), 0
    (rows, rank), (same, columns) = own[f"{part}_a"], own[f"{part}_b"]
    if rank != same:
        raise ValueError(part)
    return (rows, columns), rank


def _width(name: str, patches: tuple[Patch, ...]) -> int | None:
    """The width of the model the shapes were made for; all layers must agree on it."""
    if any(_is_flux1(patch) for patch in patches):
        raise LoraError(f"LoRA {name!r} was trained for FLUX.1; train it on a FLUX.2-klein model")
    widths = {width for patch in patches if (width := _hidden(patch))}
    if len(widths) > 1:
        raise LoraError(f"LoRA {name!r} mixes layers of different models (widths {sorted(widths)})")
    return widths.pop() if widths else None


def _is_flux1(patch: Patch) -> bool:
    """FLUX.1's single blocks and MLPs have other proportions than FLUX.2's."""
    rows, columns = patch.shape
    module = patch.modules[0]
    if module.endswith("to_qkv_mlp_proj"):
        return rows == 7 * columns
    return module.endswith("linear_in") and rows == 4 * columns


_READS_HIDDEN = ("_proj", "linear_in", "to_q", "to_k", "to_v")
_WRITES_HIDDEN = ("attn.to_out", "attn.to_out.0", "attn.to_add_out", "linear_out")


def _hidden(patch: Patch) -> int | None:
    rows, columns = patch.shape
    module = patch.modules[0]
    if module.endswith(_READS_HIDDEN):
        return columns
    return rows if module.endswith(_WRITES_HIDDEN) else None


def _format(
    prefixes: Counter[str], layers: Mapping[str, object], patches: tuple[Patch, ...]
) -> str:
    prefix = prefixes.most_common(1)[0][0]
    kinds = {patch.kind for patch in patches}
    bfl = any(layer.startswith(("double_blocks", "single_blocks")) for layer in layers)
    if kinds == {"lora"} and prefix == "diffusion_model." and bfl:
        return "ai-toolkit"
    named = {"lora_unet_": "kohya", "transformer.": "diffusers", "base_model.model.": "peft"}
    style = named.get(prefix, "bfl" if bfl else "diffusers")
    kind = "+".join(sorted(kinds))
    return style if kind == "lora" else f"{style} {kind}"


def _trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The tags ai-toolkit and kohya write: {"1_name": {"word": count}}."""
    try:
        folders = json.loads(metadata.get("ss_tag_frequency", "{}"))
        return tuple(dict.fromkeys(str(tag) for tags in folders.values() for tag in tags))[:8]
    except (ValueError, AttributeError, TypeError):
        return ()


def _training(metadata: Mapping[str, str]) -> dict[str, str]:
    """Claims worth showing; ai-toolkit and kohya write JSON into some of the strings."""
    found = {
        "base_model": metadata.get("ss_base_model_version", ""),
        "name": metadata.get("name", "") or metadata.get("ss_output_name", ""),
        "alpha": metadata.get("ss_network_alpha", ""),
    }
    for key, inner in (("training_info", ("step", "epoch")), ("software", ("name", "version"))):
        try:
            stored = json.loads(metadata.get(key, "{}"))
            found |= {f"{key}_{name}": str(stored[name]) for name in inner if name in stored}
        except (ValueError, TypeError):
            continue
    return {key: value[:200] for key, value in found.items() if value}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _some(head: header.Header) -> str:
    return ", ".join(repr(name[:60]) for name in list(head.shapes)[:3])
