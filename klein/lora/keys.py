"""From the tensor names of a LoRA file to the linear layers they change.

Trainers name FLUX.2's layers as Black Forest Labs do (`double_blocks.0.img_attn.qkv`) or as
diffusers does (`transformer_blocks.0.attn.to_q`), under one of several prefixes, with dots or with
underscores. All of them come out as diffusers' names here.
"""

import re
from dataclasses import dataclass

PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "lora_unet_",
    "lora_transformer_",
)

_SUFFIX = re.compile(
    r"\.(?:(?P<lora>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(?:\.default)?(?:\.weight)?"
    r"|(?P<alpha>alpha)"
    r"|(?P<dora>dora_scale|magnitude|lora_magnitude_vector(?:\.default)?(?:\.weight)?)"
    r"|(?P<lycoris>lokr_(?:w1|w2)(?:_a|_b)?|lokr_t2|hada_(?:w1|w2)_[ab]|hada_t[12])"
    r"|(?P<diff>diff))$"
)
_PART = {
    "lora_A": "down",
    "lora_down": "down",
    "lora.down": "down",
    "lora_B": "up",
    "lora_up": "up",
    "lora.up": "up",
}


@dataclass(frozen=True, slots=True)
class Key:
    """One tensor name taken apart: prefix, layer as the file names it, and which part it is."""

    prefix: str
    layer: str
    part: str


def take_apart(name: str) -> Key | None:
    """The parts of a tensor name, or None for a name no LoRA format uses."""
    suffix = _SUFFIX.search(name)
    if not suffix:
        return None
    layer, prefix = name[: suffix.start()], ""
    while hit := next((p for p in PREFIXES if layer.startswith(p)), None):
        layer, prefix = layer[len(hit) :], prefix + hit
    if suffix["lora"]:
        part = _PART[suffix["lora"]]
    elif suffix["dora"]:
        part = "magnitude"
    else:
        part = suffix["alpha"] or suffix["lycoris"] or suffix["diff"]
    return Key(prefix, layer, part)
