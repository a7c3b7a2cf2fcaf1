"""From the tensor names of a LoRA file to the layers they change.

Trainers name FLUX.2's layers as Black Forest Labs do (`double_blocks.0.img_attn.qkv`) or as
diffusers does (`transformer_blocks.0.attn.to_q`), under one of several prefixes, with dots or with
underscores. All of them come out as diffusers' names here.
"""

import functools
import re
from dataclasses import dataclass

from klein.models.layers import SWAPPED_HALVES, modules_by_layer, norms_by_layer

PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "unet.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)
UNSUPPORTED = {
    "oft_blocks": "in the OFT or BOFT form of LyCORIS",
    "oft_diag": "in the OFT form of kohya's trainer",
    "rescale": "in the OFT or BOFT form of LyCORIS",
    "lokr_t2": "in the convolution form of LyCORIS",
    "hada_t1": "in the convolution form of LyCORIS",
    "hada_t2": "in the convolution form of LyCORIS",
    "lora_mid": "in the convolution form of LyCORIS",
    "a1": "a GLoRA",
    "a2": "a GLoRA",
    "b1": "a GLoRA",
    "b2": "a GLoRA",
    "set_weight": "a whole weight, not a change of one",
    "reshape_weight": "of a model with reshaped layers",
}
"""Parts that are known and not applied → what a layer with one is."""

_ADAPTER = r"(?:\.(?!(?:weight|bias)$)[\w-]+)?"
"""PEFT's name for an adapter, in the middle of a tensor's."""
_SUFFIX = re.compile(
    r"\.(?:(?:lora_|lora\.|lora_linear_layer\.)(?P<lora>A|B|down|up)"
    rf"{_ADAPTER}(?:\.weight)?"
    rf"|(?P<dora>dora_scale|magnitude|lora_magnitude_vector{_ADAPTER}(?:\.weight)?)"
    rf"|oft_R{_ADAPTER}\.(?P<oft>weight|scaled_oft)"
    r"|(?P<bias>diff_b|b_norm)"
    r"|(?P<diff>diff|w_norm)"
    r"|(?P<same>alpha|lokr_w[12](?:_[ab])?|hada_w[12]_[ab])"
    rf"|(?P<unsupported>{'|'.join(UNSUPPORTED)})(?:\.weight)?)$"
)
_PART = {"A": "down", "down": "down", "B": "up", "up": "up"}
_TEXT_ENCODER = re.compile(
    r"(?:base_model\.model\.)?(?:text_encoders?(?:_\d)?|lora_te\d?|te\d?)[._]"
)


@dataclass(frozen=True, slots=True)
class Key:
    """One tensor name taken apart: prefix, layer as the file names it, and which part it is."""

    prefix: str
    layer: str
    part: str


@dataclass(frozen=True, slots=True)
class Target:
    """What a layer is in diffusers' model: the rows of these modules, one after another.

    With `swapped_halves` Black Forest Labs keep them as shift, scale and diffusers as scale, shift.
    A `leading` layer is only the q, k and v of its module, which are its first rows.
    """

    modules: tuple[str, ...]
    swapped_halves: bool = False
    leading: bool = False


def take_apart(name: str) -> Key | None:
    """The parts of a tensor name, or None for a name no LoRA format uses."""
    suffix = _SUFFIX.search(name)
    if not suffix:
        return None
    layer, prefix = name[: suffix.start()], ""
    while hit := next((p for p in PREFIXES if layer.startswith(p)), None):
        layer, prefix = layer[len(hit) :], prefix + hit
    kind = suffix.lastgroup or ""
    named = {
        "lora": _PART.get(suffix["lora"], ""),
        "dora": "magnitude",
        "oft": "oft" if suffix["oft"] == "weight" else "scaled_oft",
        "bias": "bias",
        "diff": "diff",
    }
    return Key(prefix, layer, named.get(kind) or suffix[kind])


def is_of_text_encoder(name: str) -> bool:
    """Whether a tensor changes a text encoder, which no klein LoRA acts on."""
    return bool(_TEXT_ENCODER.match(name))


@functools.cache
def targets() -> dict[str, Target]:
    """Every spelling of every layer."""
    found: dict[str, Target] = {}
    for name, modules in modules_by_layer().items():
        found[name] = Target(modules, name in SWAPPED_HALVES)
        if name.startswith("transformer_blocks"):
            found[f"sformer{name.removeprefix('transformer')}"] = found[name]
        if name.endswith(("attn.qkv", "attn_qkv")):
            for part, module in zip("qkv", modules, strict=True):
                found[f"{name.removesuffix('qkv')}to_{part}"] = Target((module,))
        if name.endswith("linear1"):
            found[f"{name}_qkv"] = Target(modules, leading=True)
    for name, module in norms_by_layer().items():
        for spelling in (name, f"{name}.scale"):
            found[spelling] = found[spelling.replace(".", "_")] = Target((module,))
    return found
