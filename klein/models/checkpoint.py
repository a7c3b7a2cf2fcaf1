"""What a file of a transformer's weights is, told from its header: which model, by whose names and
in which numbers. What klein cannot use is refused, with the reason and what to use instead.

The names are those of Black Forest Labs or of diffusers. float8 comes as Black Forest Labs write it
(`weight_scale`, one for each row or one for all), as ComfyUI does (the same beside `comfy_quant`,
or `scale_weight` under a `scaled_fp8` mark), or as a mere cast without scales.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from klein.errors import ModelUnavailable
from klein.models import catalog, layers
from klein.models.catalog import ModelSpec
from klein.sources import safetensors
from klein.sources.safetensors import Damaged, Entry, Header

FIELD = "KLEIN_TRANSFORMER"
MAX_HEADER_BYTES = 16 * 1024**2
MAX_NOTE_BYTES = 4096
"""Of the JSON that ComfyUI keeps beside a layer."""
FLOAT8 = "F8_E4M3"
PLAIN = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")
BUNDLED = {
    "text_encoders.": "text encoder",
    "text_encoder.": "text encoder",
    "conditioner.": "text encoder",
    "cond_stage_model.": "text encoder",
    "first_stage_model.": "VAE",
    "vae.": "VAE",
}
"""What some files hold beside the transformer: it is MODEL_ID's that is used."""
SCALES = ("weight_scale", "scale_weight")
UNUSED = ("input_scale", "scale_input", "comfy_quant")
"""Beside a float8 weight, and not needed: klein scales each row of what it is multiplied by."""
USE_INSTEAD = "use the bf16 file of it, or the float8 (e4m3) one"
QUANTISED = {
    "weight_scale_2": "NVFP4",
    "pre_quant_scale": "AWQ",
    "qweight": "SVDQuant or AWQ",
    "qzeros": "AWQ or GPTQ",
    "absmax": "bitsandbytes' 4 bits",
}
"""Last part of a tensor's name → the quantisation that klein does not read."""
OTHER_NUMBERS = {
    "U8": "4 bits (NVFP4 or the like)",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
}
"""Type of a weight → the same."""
FOREIGN = (
    (r"lora_|lokr_|hada_", "a LoRA: name it in a request's `loras`, or in KLEIN_BASE_LORAS"),
    (r"guidance_in\.|guidance_embedder", "FLUX.2-dev"),
    (r"distilled_guidance_layer", "Chroma"),
    (r"img_mod\.lin|proj_mlp|transformer_blocks\.\d+\.norm1\.linear", "FLUX.1"),
    (r"joint_blocks\.", "Stable Diffusion 3"),
    (r"mode_blocks\.", "FLUX.3"),
    (r"noise_refiner", "Z-Image or Lumina"),
    (r"img_mlp\.net", "Qwen-Image"),
    (r"cross_attn|patch_embedding", "Wan"),
    (r"input_blocks\.|down_blocks\.\d+\.attentions", "Stable Diffusion or SDXL"),
    (r"^(model\.)?layers\.\d+\.(self_attn|mlp)|lm_head", "a text encoder"),
    (r"^(encoder|decoder)\.(up|down|mid|conv)", "a VAE"),
)
"""What a tensor's name gives away, the surest first."""
KNOWN_FILES = {
    "4a54fad7": ("klein-base-9B", 18_157_185_168),
    "0975d6b7": ("klein-9B", 18_157_185_168),
    "a9f5028c": ("klein-base-9B", 9_567_278_472),
}
"""The first 8 digits of a file's sha256 → its model and size in bytes."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a file. Its rows are those of `parameters`, names of diffusers with the rows
    each has, in that order; those of float8 are multiplied by `scale`, another tensor, if any."""

    parameters: tuple[tuple[str, int], ...]
    float8: bool = False
    scale: str | None = None
    swapped_halves: bool = False


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A transformer in one file, or in the shards of a folder. `files` is empty as long as it is
    elsewhere; `numbers` says in words what its weights are, `notes` what else there is to say."""

    name: str
    width: int
    double_blocks: int
    single_blocks: int
    numbers: str
    tensors: Mapping[str, Stored]
    notes: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    sha256: str | None = None

    @property
    def float8(self) -> bool:
        """Whether weights are float8 already."""
        return any(stored.float8 for stored in self.tensors.values())

    def spec(self, asked: ModelSpec) -> tuple[ModelSpec, str]:
        """The model it is, for `asked` by MODEL_ID, and how that is known. Raises ModelUnavailable
        for a file that is another one's."""
        own = (self.width, self.double_blocks, self.single_blocks)
        if own != (asked.hidden, asked.double_blocks, asked.single_blocks):
            raise _refused(self.name, _other_geometry(own, asked))
        name, _ = KNOWN_FILES.get((self.sha256 or "")[:8], (None, 0))
        if name and catalog.MODELS[name].hidden == asked.hidden:
            return catalog.MODELS[name], f"{name} by its sha256"
        kind = "distilled" if asked.distilled else "not distilled"
        return asked, f"taken to be {kind}, as MODEL_ID is: its shapes do not tell"


def inspect(files: Sequence[Path], name: str) -> Checkpoint:
    """What the files are; raises ModelUnavailable for those that klein cannot use, or read."""
    entries: list[Entry] = []
    formats: dict[str, object] = {}
    try:
        for path in files:
            with path.open("rb") as file:
                header = _header(file, name)
                entries += header.entries
                formats |= metadata_formats(header) | _comfy_formats(file, header)
    except Damaged as error:
        raise _refused(name, f"is damaged: {error}; download it again") from error
    except OSError as error:
        raise _refused(name, f"cannot be read ({error.strerror})") from error
    return replace(recognise(entries, name, formats), files=tuple(files))


def at(place: str) -> Checkpoint:
    """The transformer in a file, or in a folder of diffusers or its `transformer`; raises
    ModelUnavailable."""
    path = Path(place).expanduser()
    if not path.is_dir():
        return inspect([path], path.name)
    inside = path / "transformer"
    files = sorted((inside if inside.is_dir() else path).glob("*.safetensors"))
    return inspect(files, path.name)


def of_folder(folder: Path) -> Checkpoint | None:
    """The quantised transformer in a folder of diffusers; None for one that is not quantised.

    Raises ModelUnavailable, for MODEL_ID, for a quantisation that klein does not read.
    """
    try:
        told = json.loads((folder / "config.json").read_text()).get("quantization_config")
    except (OSError, ValueError, AttributeError):  # said where the configuration is needed
        return None
    if not told:
        return None
    name = "the transformer in MODEL_ID's folder"
    try:
        if (method := str(told.get("quant_method"))[:40]) != "bfl":
            raise _refused(name, f"is quantised by {method!r}: {USE_INSTEAD}")
        return inspect(sorted(folder.glob("*.safetensors")), name)
    except ModelUnavailable as error:
        why = str(error).removeprefix(f"{FIELD}: ")
        raise ModelUnavailable(f"MODEL_ID: {why}", field="MODEL_ID") from error


def recognise(
    entries: Iterable[Entry], name: str, formats: Mapping[str, object] | None = None
) -> Checkpoint:
    """What a file with these tensors is. `formats` are what ComfyUI's notes on its layers say."""
    found, notes = _own(entries, name)
    _require_known_numbers(found, name, formats or {})
    tensors: dict[str, Stored] = {}
    unknown = []
    for tensor, entry in found.items():
        layer, _, part = tensor.rpartition(".")
        if stored := _stored(entry, layer, part, found):
            tensors[entry.name] = stored
        elif not _is_beside(layer, part, found):
            unknown.append(tensor)
    if unknown or not tensors:
        raise _refused(name, _foreign(unknown, len(found)))
    own = _Geometry.of(tensors, found, name)
    own.require_whole(tensors, name)
    return Checkpoint(
        name,
        own.width,
        own.double_blocks,
        own.single_blocks,
        _numbers(tensors, found),
        tensors,
        notes,
    )


def _header(file: IO[bytes], name: str) -> Header:
    if file.read(4) == b"GGUF":
        raise _refused(name, f"is in GGUF, which klein does not read: {USE_INSTEAD}")
    file.seek(0)
    return safetensors.read(file, MAX_HEADER_BYTES)


def _own(entries: Iterable[Entry], name: str) -> tuple[dict[str, Entry], tuple[str, ...]]:
    """The transformer's tensors without their prefix, and what is left alone."""
    found: dict[str, Entry] = {}
    bundled: Counter[str] = Counter()
    for entry in entries:
        if kind := next((BUNDLED[p] for p in BUNDLED if entry.name.startswith(p)), None):
            bundled[kind] += 1
            continue
        prefix = next((p for p in PREFIXES if entry.name.startswith(p)), "")
        tensor = entry.name.removeprefix(prefix)
        if tensor in found:
            raise _refused(name, f"has {tensor[:90]!r} twice, under two prefixes")
        found[tensor] = entry
    notes = [f"the {kind} in {name} is left alone: MODEL_ID's is used" for kind in bundled]
    return found, tuple(notes)


def _stored(entry: Entry, layer: str, part: str, found: Mapping[str, Entry]) -> Stored | None:
    """What a weight becomes; None for what is no weight of FLUX.2's."""
    rows = entry.shape[0] if entry.shape else 0
    norm = layers.norms_by_layer().get(layer)
    if norm and part in ("scale", "weight"):
        return Stored(((f"{norm}.weight", rows),))
    modules = layers.modules_by_layer().get(layer)
    if not modules or part != "weight" or entry.dtype not in (*PLAIN, FLOAT8):
        return None
    scale = next((found[x].name for x in _scale_names(layer) if x in found), None)
    share = rows // len(modules)
    return Stored(
        tuple((f"{module}.weight", share) for module in modules),
        float8=entry.dtype == FLOAT8,
        scale=scale,
        swapped_halves=layer in layers.SWAPPED_HALVES,
    )


def _scale_names(layer: str) -> list[str]:
    return [f"{layer}.{part}" for part in SCALES]


def _is_beside(layer: str, part: str, found: Mapping[str, Entry]) -> bool:
    """Whether a tensor is one that a quantised file has beside its weights."""
    if not layer:
        return part == "scaled_fp8"
    weight = found.get(f"{layer}.weight")
    return part in (*SCALES, *UNUSED) and weight is not None and weight.dtype == FLOAT8


# -- numbers -----------------------------------------------------------------------------------


def _require_known_numbers(
    found: Mapping[str, Entry], name: str, formats: Mapping[str, object]
) -> None:
    """Raise for weights that are quantised in another way than klein reads."""
    for tensor, entry in found.items():
        layer, _, part = tensor.rpartition(".")
        other = QUANTISED.get(part) or (part == "weight" and OTHER_NUMBERS.get(entry.dtype))
        if "quant_state" in tensor:
            other = QUANTISED["absmax"]
        if part in SCALES and f"{layer}.weight" in found and not other:
            other = _odd_scale(entry, found[f"{layer}.weight"])
        if other:
            raise _refused(name, f"is in {other}, which klein does not read: {USE_INSTEAD}")
    for layer, told in formats.items():
        if layer.startswith(tuple(BUNDLED)):
            continue
        if not isinstance(told, dict) or told.get("format") != "float8_e4m3fn":
            kind = str(told.get("format") if isinstance(told, dict) else told)[:40]
            raise _refused(name, f"is in {kind!r} at {layer[:80]!r}: {USE_INSTEAD}")
        if rotated := next((key for key in told if key.startswith(("convrot", "pre_"))), None):
            raise _refused(
                name, f"has weights that are transformed ({rotated[:40]}): {USE_INSTEAD}"
            )


def _odd_scale(scale: Entry, weight: Entry) -> str | None:
    """Why a scale is none that klein reads, in words that follow "is in"."""
    if weight.dtype in PLAIN:
        return f"{PLAIN[weight.dtype]} with scales"
    if math.prod(scale.shape) not in (1, *weight.shape[:1]):
        return "float8 with scales by block (MXFP8 or the like)"
    return None if scale.dtype in PLAIN else f"float8 with scales of type {scale.dtype}"


def metadata_formats(header: Header) -> dict[str, object]:
    """What the header's own note says of each layer."""
    try:
        told = json.loads(header.metadata.get("_quantization_metadata", "{}"))
        return dict(told.get("layers", {}))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged("its _quantization_metadata is not what it should be") from error


def _comfy_formats(file: IO[bytes], header: Header) -> dict[str, object]:
    """What the notes of ComfyUI beside the layers say."""
    formats: dict[str, object] = {}
    for entry in header.entries:
        if not entry.name.endswith(".comfy_quant"):
            continue
        if entry.end - entry.begin > MAX_NOTE_BYTES:
            raise Damaged(f"{entry.name[:80]!r} is too long for a note")
        file.seek(entry.begin)
        try:
            formats[entry.name] = json.loads(file.read(entry.end - entry.begin))
        except (ValueError, RecursionError) as error:
            raise Damaged(f"{entry.name[:80]!r} is not JSON") from error
    return formats


def _numbers(tensors: Mapping[str, Stored], found: Mapping[str, Entry]) -> str:
    """What most of the weights are, in words."""
    by_name = {entry.name: entry for entry in found.values()}
    scales = [by_name[x.scale] for x in tensors.values() if x.scale]
    if any(stored.float8 for stored in tensors.values()):
        each = "row" if any(math.prod(scale.shape) > 1 for scale in scales) else "layer"
        return f"float8 with a scale for each {each}" if scales else "float8 without scales"
    kinds = Counter(by_name[name].dtype for name in tensors)
    return PLAIN[kinds.most_common(1)[0][0]]


# -- models ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Geometry:
    """A transformer's width and numbers of blocks."""

    width: int
    double_blocks: int
    single_blocks: int

    @classmethod
    def of(
        cls, tensors: Mapping[str, Stored], found: Mapping[str, Entry], name: str
    ) -> "_Geometry":
        """As the tensors say; raises ModelUnavailable if their shapes do not agree on one."""
        by_name = {entry.name: entry for entry in found.values()}
        widths = Counter(by_name[x].shape[-1] for x in tensors if len(by_name[x].shape) == 2)
        width = widths.most_common(1)[0][0] if widths else 0
        for tensor, stored in tensors.items():
            entry = by_name[tensor]
            if not _fits(entry, stored, width):
                raise _refused(
                    name,
                    f"is no transformer of one width: {entry.name[:90]!r} is {list(entry.shape)} "
                    f"in {entry.dtype}, and most are {width} wide",
                )
        return cls(width, _count(tensors, "transformer_blocks"), _count(tensors, "single_trans"))

    def require_whole(self, tensors: Mapping[str, Stored], name: str) -> None:
        """Raise for parameters that are missing, or there twice."""
        counts = Counter(parameter for x in tensors.values() for parameter, _ in x.parameters)
        if twice := next((x for x, count in counts.items() if count > 1), None):
            raise _refused(name, f"has {twice!r} twice, by the names of two formats")
        wanted = (f"{x}.weight" for x in layers.modules(self.double_blocks, self.single_blocks))
        if missing := [parameter for parameter in wanted if parameter not in counts]:
            raise _refused(
                name,
                f"is not whole: it lacks {len(missing)} tensors, {missing[0]!r} among them",
            )


def _count(tensors: Mapping[str, Stored], blocks: str) -> int:
    """One more than the highest index of a kind of block."""
    names = (x.parameters[0][0].split(".") for x in tensors.values())
    return max((int(x[1]) + 1 for x in names if x[0].startswith(blocks)), default=0)


def _fits(entry: Entry, stored: Stored, width: int) -> bool:
    """Whether a tensor has the shape and the type that it has in a model of that width."""
    parameter = stored.parameters[0][0].removesuffix(".weight")
    if ".norm_" in parameter:
        return len(entry.shape) == 1 and entry.shape[0] > 0 and entry.dtype in PLAIN
    expected = layers.shape(parameter, width)
    if expected is None:
        return len(entry.shape) == 2 and width in entry.shape and 0 not in entry.shape
    return width > 0 and entry.shape == (expected[0] * len(stored.parameters), expected[1])


def _other_geometry(own: tuple[int, int, int], asked: ModelSpec) -> str:
    rows = [
        row.name
        for row in catalog.MODELS.values()
        if (row.hidden, row.double_blocks, row.single_blocks) == own
    ]
    same_kind = [x for x in rows if catalog.MODELS[x].distilled == asked.distilled] or rows
    if same_kind:
        return f"is of {same_kind[0]}, and MODEL_ID is {asked.name}: set MODEL_ID={same_kind[0]}"
    kind = "FLUX.2-dev" if own == (6144, 8, 48) else f"a model of width {own[0]}"
    return (
        f"is of {kind} with {own[1]} double and {own[2]} single blocks, and MODEL_ID is "
        f"{asked.name}: take a file of that model"
    )


def _foreign(unknown: Sequence[str], total: int) -> str:
    guesses = (kind for sign, kind in FOREIGN if any(re.search(sign, x) for x in unknown))
    if kind := next(guesses, None):
        return f"is {'' if kind.startswith('a ') else 'of '}{kind}; klein takes FLUX.2-klein's"
    if not unknown:
        return "holds no transformer"
    return (
        f"is not FLUX.2's: {len(unknown)} of its {total} tensors are unknown there, such as "
        f"{unknown[0][:90]!r}"
    )


def _refused(name: str, why: str) -> ModelUnavailable:
    return ModelUnavailable(f"{FIELD}: {name} {why}", field=FIELD)
