"""From the tensor names of a LoRA file to the linear layers they change.

Trainers name FLUX.2's layers as Black Forest Labs do (`double_blocks.0.img_attn.qkv`) or as
diffusers does (`transformer_blocks.0.attn.to_q`), under one of several prefixes, with dots or with
underscores. All of them come out as diffusers' names here.
"""

import functools
import re
from dataclasses import dataclass

MAX_BLOCKS = 64

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

_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
    "txt_mlp.0": ("ff_context.linear_in",),
    "txt_mlp.2": ("ff_context.linear_out",),
}
_SINGLE = {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)}
_OTHER = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
SWAPPED_HALVES = "final_layer.adaLN_modulation.1"
"""BFL stores shift then scale here, diffusers scale then shift."""


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


@functools.cache
def modules() -> dict[str, tuple[str, ...]]:
    """Every spelling of every layer → the diffusers modules it covers, in the order of its rows."""
    dotted: dict[str, tuple[str, ...]] = {}
    for block in range(MAX_BLOCKS):
        for names, bfl, diffusers in (
            (_DOUBLE, "double_blocks", "transformer_blocks"),
            (_SINGLE, "single_blocks", "single_transformer_blocks"),
        ):
            for layer, parts in names.items():
                targets = tuple(f"{diffusers}.{block}.{part}" for part in parts)
                dotted[f"{bfl}.{block}.{layer}"] = targets
                dotted.update((target, (target,)) for target in targets)
    for layer, module in _OTHER.items():
        dotted[layer] = dotted[module] = (module,)
    return dotted | {name.replace(".", "_"): targets for name, targets in dotted.items()}
