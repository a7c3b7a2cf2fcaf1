"""A model's transformer written as one file, in each format that people share.

The names are written out by a converter of its own, so that klein's tables are not tested by
themselves.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from klein.models.identify import NANO_FOLDER

NANO = NANO_FOLDER / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
FP8 = torch.float8_e4m3fn
_RENAMED = (
    ("single_transformer_blocks.", "single_blocks."),
    ("transformer_blocks.", "double_blocks."),
    ("x_embedder", "img_in"),
    ("context_embedder", "txt_in"),
    ("time_guidance_embed.timestep_embedder.linear_1", "time_in.in_layer"),
    ("time_guidance_embed.timestep_embedder.linear_2", "time_in.out_layer"),
    ("_modulation_img.linear", "_modulation_img.lin"),
    ("_modulation_txt.linear", "_modulation_txt.lin"),
    ("single_stream_modulation.linear", "single_stream_modulation.lin"),
    ("proj_out", "final_layer.linear"),
    ("norm_out.linear", "final_layer.adaLN_modulation.1"),
    ("attn.to_qkv_mlp_proj", "linear1"),
    ("attn.norm_added_q.weight", "txt_attn.norm.query_norm.scale"),
    ("attn.norm_added_k.weight", "txt_attn.norm.key_norm.scale"),
    ("attn.to_out.0", "img_attn.proj"),
    ("attn.to_add_out", "txt_attn.proj"),
    ("ff_context.linear_in", "txt_mlp.0"),
    ("ff_context.linear_out", "txt_mlp.2"),
    ("ff.linear_in", "img_mlp.0"),
    ("ff.linear_out", "img_mlp.2"),
)
_FUSED = {
    "img_attn.qkv": ("to_q", "to_k", "to_v"),
    "txt_attn.qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


def nano() -> dict[str, Tensor]:
    """nano's transformer by diffusers' names, bfloat16."""
    return load_file(NANO)


def bfl(weights: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The same by Black Forest Labs' names."""
    made: dict[str, Tensor] = {}
    rest = dict(weights)
    for block in range(sum(name.endswith("add_q_proj.weight") for name in weights)):
        for fused, parts in _FUSED.items():
            rows = [rest.pop(f"transformer_blocks.{block}.attn.{x}.weight") for x in parts]
            made[f"double_blocks.{block}.{fused}.weight"] = torch.cat(rows)
    for name, tensor in rest.items():
        single = name.startswith("single")
        for old, new in _RENAMED:
            name = name.replace(old, new)
        norm = "norm" if single else "img_attn.norm"
        name = name.replace("attn.norm_q.weight", f"{norm}.query_norm.scale")
        name = name.replace("attn.norm_k.weight", f"{norm}.key_norm.scale")
        made[name.replace("attn.to_out.", "linear2.")] = tensor
    final = "final_layer.adaLN_modulation.1.weight"
    made[final] = torch.cat(made[final].chunk(2)[::-1])
    return {f"{prefix}{name}": tensor.contiguous() for name, tensor in made.items()}


def is_linear(name: str, tensor: Tensor) -> bool:
    """Whether a quantised file has a tensor in float8: the linears of the blocks."""
    return tensor.ndim == 2 and "blocks." in name


def float8(
    weights: Mapping[str, Tensor],
    *,
    rows: bool,
    scale: str = "weight_scale",
    every: bool = False,
) -> dict[str, Tensor]:
    """Linears in float8 with a scale for each row, or one for each layer: those of the blocks, or
    `every` one."""
    made: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if not (is_linear(name, tensor) or (every and tensor.ndim == 2)):
            made[name] = tensor
            continue
        most = tensor.float().abs().amax(1) if rows else tensor.float().abs().amax()
        by = most.clamp_min(1e-12) / 448
        made[name] = (tensor.float() / (by[:, None] if rows else by)).to(FP8)
        made[f"{name.removesuffix('weight')}{scale}"] = by
    return made


def comfy(weights: Mapping[str, Tensor], told: Mapping[str, object]) -> dict[str, Tensor]:
    """`weights` in float8 with ComfyUI's note beside each layer."""
    made = float8(weights, rows=False)
    note = torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)
    for name in list(made):
        if name.endswith(".weight_scale"):
            layer = name.removesuffix(".weight_scale")
            made[f"{layer}.comfy_quant"] = note.clone()
            made[f"{layer}.input_scale"] = torch.tensor(1.0)
    return made


def legacy(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights` in float8 as ComfyUI's former format has them."""
    return {"scaled_fp8": torch.empty(0, dtype=FP8)} | float8(
        weights, rows=False, scale="scale_weight"
    )


def cast(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Block linears cast to float8, without scales."""
    return {k: x.to(FP8) if is_linear(k, x) else x for k, x in weights.items()}


def bundle(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An all-in-one file: a text encoder and a VAE beside the transformer."""
    inside = {f"model.diffusion_model.{name}": x for name, x in bfl(weights).items()}
    return inside | {
        "text_encoders.qwen3_4b.model.layers.0.mlp.up_proj.weight": torch.ones(4, 4),
        "vae.decoder.conv_in.weight": torch.ones(4, 4, 3, 3),
    }


def write(
    to: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """The file `to`."""
    save_file({name: x.contiguous() for name, x in tensors.items()}, to, dict(metadata or {}))
    return to
