"""Which bytes a LoRA is: its format, rank, base model and the layers it changes."""

import hashlib
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TypeVar

from klein.errors import LoraError, LoraUnavailable
from klein.lora import keys, metadata
from klein.lora.keys import UNSUPPORTED, Target
from klein.lora.metadata import LoraDefaults
from klein.lora.shapes import measure
from klein.sources import safetensors
from klein.sources.safetensors import Damaged, Entry, Header, Shape

MAX_HEADER_BYTES = 8 * 1024 * 1024
"""Of a LoRA's header: thousands of tensors and a trainer's notes take 2 MB."""
SETTLED_NS = 2_000_000_000
"""After its last change a file is settled: clocks of file systems tick as slowly as every 2 s, and
two changes within one tick look like one."""

T = TypeVar("T")
Raw = bytes | memoryview

_KINDS: tuple[tuple[str, frozenset[str]], ...] = (
    ("oft", frozenset({"oft"})),
    ("lokr", frozenset({"lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a"})),
    ("loha", frozenset({"hada_w1_a"})),
    ("dora", frozenset({"magnitude"})),
    ("lora", frozenset({"down", "up"})),
    ("diff", frozenset({"diff"})),
)


@dataclass(frozen=True, slots=True)
class Patch:
    """What a file does to one of its layers, which is `target` in diffusers' model.

    `tensors` maps a part (`down`, `up`, `alpha`, …) to the tensor's name in the file. `shape` is
    (out, in) of the change, 0 where the tensors leave it open; that of a norm of n is (n, 1).
    """

    layer: str
    target: Target
    kind: str
    tensors: Mapping[str, str]
    rank: int
    shape: tuple[int, int]

    @property
    def modules(self) -> tuple[str, ...]:
        """The diffusers modules whose weights, stacked by rows, the layer is."""
        return self.target.modules


WIDTHS = {
    192: "klein nano",
    3072: "FLUX.2-klein 4B",
    4096: "FLUX.2-klein 9B",
    6144: "FLUX.2-dev",
}
"""Transformer width → the models of that width."""


@dataclass(frozen=True, slots=True)
class Identity:
    """One state of a file on disk: another one has other bytes, or may have.

    Its owner can set `mtime_ns` back; nobody sets `ctime_ns`.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, stat: os.stat_result) -> "Identity":
        """That of a file whose `stat` it is."""
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)

    @property
    def is_settled(self) -> bool:
        """Whether a change from now on makes another identity of it."""
        return time.time_ns() - self.ctime_ns > SETTLED_NS


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
    identity: Identity
    defaults: LoraDefaults = LoraDefaults()
    settled: bool = False
    """Whether it had settled before it was hashed, so that its identity stands for its hash."""
    biases: tuple[str, ...] = ()
    """Tensors that change biases, which no layer has: they must be zero."""
    left_out: int = 0
    """Tensors for a text encoder, on which no klein LoRA acts."""

    @property
    def base(self) -> str:
        """The model it was trained for, by its shapes."""
        if self.hidden is None:
            return "unknown"
        return WIDTHS.get(self.hidden, "another model") + f" (width {self.hidden})"

    @property
    def trigger(self) -> str | None:
        """The word that calls it: the operator's, else the first in its metadata."""
        return self.defaults.trigger or next(iter(self.trigger_words), None)

    @property
    def rank(self) -> int:
        """The largest rank in the file, or block of an OFT; 0 where the format has none."""
        return max(patch.rank for patch in self.patches)

    def load(
        self, read: Callable[[int, tuple[Entry, ...]], T], raw: Callable[[T], Iterable[Raw]]
    ) -> T:
        """What `read` makes of an open descriptor of the file and its tensors, in their order.

        It is proved to be made of the bytes that were inspected: by the identity of a settled file
        before and after, else by hashing what `raw` gives back of it, tensor by tensor. (Who maps
        the file and writes to pages that he wrote to before can hide that until the kernel writes
        them out.) Raises LoraUnavailable for a file that was replaced or deleted since, or that
        the disk does not give.
        """
        try:
            with safetensors.open_regular(self.path) as file:
                before = Identity.of(os.fstat(file.fileno()))
                if before.size != self.identity.size:
                    raise self._changed()
                entries = safetensors.read(file, MAX_HEADER_BYTES).entries
                loaded = read(file.fileno(), entries)
                after = Identity.of(os.fstat(file.fileno()))
                if not (self.settled and self.identity == before == after):
                    head = os.pread(file.fileno(), entries[0].begin, 0)
                    self._prove(chain((head,), raw(loaded)))
            return loaded
        except OSError as error:
            raise LoraUnavailable(
                f"LoRA {self.name!r} cannot be read any more ({error.strerror}): try again"
            ) from error
        except (ValueError, IndexError) as error:  # cut off, or without a header
            raise self._changed() from error

    def _prove(self, parts: Iterable[Raw]) -> None:
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        if digest.hexdigest() != self.sha256:
            raise self._changed()

    def _changed(self) -> LoraUnavailable:
        return LoraUnavailable(
            f"LoRA {self.name!r} was replaced while it waited: ask again for the new one"
        )


def inspect(path: Path, name: str) -> LoraFile:
    """Read what `path` is; raises LoraError for a file that no klein model can use, and
    LoraUnavailable for one that cannot be read. It is opened once, so all is of the same bytes."""
    try:
        with safetensors.open_regular(path) as file:
            identity = Identity.of(os.fstat(file.fileno()))
            settled = identity.is_settled
            header = safetensors.read(file, MAX_HEADER_BYTES)
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            if Identity.of(os.fstat(file.fileno())) != identity:
                raise LoraUnavailable(f"LoRA {name!r} is being written: try again")
    except Damaged as error:
        raise LoraError(f"LoRA {name!r} is damaged: {error}") from error
    except OSError as error:
        raise LoraUnavailable(f"LoRA {name!r} cannot be read ({error.strerror})") from error
    if not header.entries:
        raise LoraError(f"LoRA {name!r} is damaged: it holds no tensors")
    return replace(_known(path, name, sha256, identity, header), settled=settled)


def _known(path: Path, name: str, sha256: str, identity: Identity, header: Header) -> LoraFile:
    shapes = header.shapes
    grouped = _group(name, shapes)
    layers = grouped.layers
    if not layers and grouped.left_out:
        raise LoraError(f"LoRA {name!r} changes only a text encoder, on which no klein LoRA acts")
    if not layers:
        some = ", ".join(repr(tensor[:60]) for tensor in list(shapes)[:3])
        raise LoraError(f"LoRA {name!r} has none of a LoRA's tensors, only such as {some}")
    known = keys.targets()
    unknown_layers = [layer for layer in layers if layer not in known]
    if unknown_layers or grouped.unknown:
        raise LoraError(_foreign(name, unknown_layers, grouped.unknown, len(layers)))
    if odd := next((entry for entry in header.entries if not _is_factor(entry)), None):
        raise LoraError(f"LoRA {name!r}: tensor {odd.name[:80]!r} is of type {odd.dtype}")
    patches = tuple(
        _patch(name, layer, known[layer], parts, shapes) for layer, parts in layers.items()
    )
    return LoraFile(
        path=path,
        name=name,
        sha256=sha256,
        identity=identity,
        format=_format(grouped.prefixes, layers, patches),
        hidden=_width(name, patches),
        patches=patches,
        trigger_words=metadata.trigger_words(header.metadata),
        training=metadata.training(header.metadata),
        biases=tuple(grouped.biases),
        left_out=grouped.left_out,
    )


def _is_factor(entry: Entry) -> bool:
    """Whether a tensor can be one of a LoRA's: trainers write floats, and alpha as any number."""
    return "F" in entry.dtype or math.prod(entry.shape) == 1


@dataclass(slots=True)
class _Grouped:
    """The tensors of a file: by layer and part, those of the others, and how they are prefixed."""

    layers: dict[str, dict[str, str]] = field(default_factory=dict)
    prefixes: Counter[str] = field(default_factory=Counter)
    biases: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    left_out: int = 0


def _group(name: str, tensors: Iterable[str]) -> _Grouped:
    grouped = _Grouped()
    for tensor in tensors:
        key = keys.take_apart(tensor)
        if keys.is_of_text_encoder(tensor):
            grouped.left_out += 1
        elif key is None:
            grouped.unknown.append(tensor)
        elif key.part == "bias":
            grouped.biases.append(tensor)
        else:
            grouped.prefixes[key.prefix] += 1
            parts = grouped.layers.setdefault(key.layer, {})
            if key.part in parts:
                raise LoraError(
                    f"LoRA {name!r} holds two adapters: {tensor[:90]!r} and "
                    f"{parts[key.part][:90]!r}; save them as two files"
                )
            parts[key.part] = tensor
    return grouped


def _foreign(name: str, unknown_layers: list[str], unknown_tensors: list[str], total: int) -> str:
    unknown = [*unknown_layers, *unknown_tensors]
    guess = ""
    if any(mark in layer for layer in unknown_layers for mark in _FLUX1):
        guess = "; it looks like a LoRA for FLUX.1"
    return (
        f"LoRA {name!r} is not for FLUX.2: {len(unknown)} of its {total} layers do not exist "
        f"there, such as {unknown[0][:90]!r}{guess}"
    )


_FLUX1 = ("img_mod", "txt_mod", "proj_mlp")
"""Parts of layer names that only FLUX.1 has."""


def _patch(
    name: str,
    layer: str,
    target: Target,
    parts: dict[str, str],
    shapes: Mapping[str, Shape],
) -> Patch:
    kind = next((kind for kind, signs in _KINDS if signs & parts.keys()), "")
    if why := _unsupported(kind, target, parts):
        raise LoraError(f"LoRA {name!r}: layer {layer!r} {why}")
    own = {part: shapes[tensor] for part, tensor in parts.items()}
    try:
        rank, shape = measure(kind, own)
    except (KeyError, ValueError) as error:
        raise LoraError(
            f"LoRA {name!r}: the tensors of layer {layer!r} do not fit together"
        ) from error
    return Patch(layer, target, kind, parts, rank, shape)


def _unsupported(kind: str, target: Target, parts: Mapping[str, str]) -> str | None:
    """Why a layer cannot be applied as its trainer meant it, or None."""
    for part, what in UNSUPPORTED.items():
        if part in parts:
            return f"is {what}, which klein does not apply"
    if not kind:
        return f"has only {', '.join(parts)}"
    if kind in ("oft", "lokr", "loha") and "magnitude" in parts:
        return f"has a dora_scale beside its {kind}: only a plain LoRA's magnitudes are applied"
    if kind == "lokr" and target.swapped_halves:
        return "is a lokr there, whose halves cannot be put into the model's order"
    if kind == "dora" and not {"down", "up"} <= parts.keys():
        return "has magnitudes and no factors"
    return None


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
        return 0 < rows == 7 * columns
    return module.endswith("linear_in") and 0 < rows == 4 * columns


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
    named = {
        "lora_unet_": "kohya",
        "transformer.": "diffusers",
        "base_model.model.": "peft",
        "lycoris_": "lycoris",
    }
    style = named.get(prefix, "bfl" if bfl else "diffusers")
    kind = "+".join(sorted(kinds))
    return style if kind == "lora" else f"{style} {kind}"
