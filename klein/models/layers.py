"""FLUX.2's linear layers, by the names of Black Forest Labs and of diffusers."""

import functools

MAX_BLOCKS = 64

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

SWAPPED_HALVES = frozenset({"final_layer.adaLN_modulation.1", "final_layer_adaLN_modulation_1"})
"""The layer, in both spellings, whose halves BFL stores as shift, scale and diffusers as scale,
shift."""


@functools.cache
def modules_by_layer() -> dict[str, tuple[str, ...]]:
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
