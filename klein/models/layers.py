"""FLUX.2's layers, by the names of Black Forest Labs and of diffusers, and their shapes."""

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

_DOUBLE_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
_SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}

_SHAPES = {
    "attn.to_qkv_mlp_proj": (9, 1),
    "attn.to_out": (1, 4),
    "ff.linear_in": (6, 1),
    "ff.linear_out": (1, 3),
    "ff_context.linear_in": (6, 1),
    "ff_context.linear_out": (1, 3),
    "time_guidance_embed.timestep_embedder.linear_2": (1, 1),
    "double_stream_modulation_img.linear": (6, 1),
    "double_stream_modulation_txt.linear": (6, 1),
    "single_stream_modulation.linear": (3, 1),
    "norm_out.linear": (2, 1),
}
"""Rows and columns of a module in widths of the model; (1, 1) for those of attention that are not
here. The four that meet the outside have a side that is no multiple of the width."""

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


@functools.cache
def norms_by_layer() -> dict[str, str]:
    """Both spellings of every norm of a block's heads → the diffusers module."""
    found: dict[str, str] = {}
    for block in range(MAX_BLOCKS):
        for names, bfl, diffusers in (
            (_DOUBLE_NORMS, "double_blocks", "transformer_blocks"),
            (_SINGLE_NORMS, "single_blocks", "single_transformer_blocks"),
        ):
            for layer, part in names.items():
                module = f"{diffusers}.{block}.{part}"
                found[f"{bfl}.{block}.{layer}"] = found[module] = module
    return found


def modules(double_blocks: int, single_blocks: int) -> list[str]:
    """The diffusers modules with weights of a model of so many blocks."""
    double = [part for parts in _DOUBLE.values() for part in parts] + [*_DOUBLE_NORMS.values()]
    single = [part for parts in _SINGLE.values() for part in parts] + [*_SINGLE_NORMS.values()]
    return [
        *(f"transformer_blocks.{i}.{part}" for i in range(double_blocks) for part in double),
        *(f"single_transformer_blocks.{i}.{part}" for i in range(single_blocks) for part in single),
        *_OTHER.values(),
    ]


def shape(module: str, width: int) -> tuple[int, int] | None:
    """Rows and columns of a linear of a model of that width; None where they are its own choice:
    the four linears that meet the outside."""
    if module in _OTHER.values():
        rows_columns = _SHAPES.get(module)
    else:
        rows_columns = _SHAPES.get(module.split(".", 2)[2], (1, 1))
    return (rows_columns[0] * width, rows_columns[1] * width) if rows_columns else None
