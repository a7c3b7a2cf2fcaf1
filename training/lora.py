"""The demo LoRAs, in ai-toolkit's key format.

python -m training.lora --out runs/nano --subject zibbo --seconds 70
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from training.demos import CHARACTER, SKETCH, STYLE, demo_pictures, demo_references
from training.flow import SQUARE, Bank, Conditioner, all_position_ids, embed_bank, flow_loss, pack
from training.model import tokenize
from training.steps import Clock, Step, cosine, make_optimizer, pick_device, report
from training.vae import encode

LINEARS = (
    r".*attn\.(to_q|to_k|to_v|add_q_proj|add_k_proj|add_v_proj|to_out\.0|to_add_out)"
    r"|.*(ff|ff_context)\.(linear_in|linear_out)"
    r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
)
SHAPES = {
    CHARACTER: (8, LINEARS),
    STYLE: (8, LINEARS),
    SKETCH: (2, r"single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"),
}
"""The rank of each demo LoRA and the linears that it is put on."""

DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
    "txt_mlp.0": ("ff_context.linear_in",),
    "txt_mlp.2": ("ff_context.linear_out",),
}
SINGLE = {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)}
SOFTWARE = {"name": "klein training", "repo": "klein", "version": "1"}


def file_modules(model: Flux2Transformer2DModel) -> dict[str, list[LoraLayer]]:
    """The file's module names and the layers of the model that each one covers."""
    found = {}
    groups = (
        ("double_blocks", "transformer_blocks", len(model.transformer_blocks), DOUBLE),
        (
            "single_blocks",
            "single_transformer_blocks",
            len(model.single_transformer_blocks),
            SINGLE,
        ),
    )
    for theirs, ours, count, table in groups:
        for index in range(count):
            for name, paths in table.items():
                layers = [model.get_submodule(f"{ours}.{index}.{path}") for path in paths]
                if isinstance(layers[0], LoraLayer):
                    found[f"diffusion_model.{theirs}.{index}.{name}"] = layers
    return found


def add_lora(model: Flux2Transformer2DModel, rank: int, linears: str) -> dict[str, list[LoraLayer]]:
    """Put a LoRA on linears of the blocks; q, k and v share one A, as the fused file does."""
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=linears))
    modules = file_modules(model)
    for layers in modules.values():
        for layer in layers[1:]:
            layer.lora_A["default"].weight = layers[0].lora_A["default"].weight
    return modules


def take(modules: dict[str, list[LoraLayer]], path: Path) -> None:
    """Begin with the weights of a file that `export` wrote."""
    tensors = load_file(path)
    with torch.no_grad():
        for name, layers in modules.items():
            layers[0].lora_A["default"].weight.copy_(tensors[f"{name}.lora_A.weight"])
            sizes = [len(layer.lora_B["default"].weight) for layer in layers]
            ups = tensors[f"{name}.lora_B.weight"].split(sizes)
            for layer, up in zip(layers, ups, strict=True):
                layer.lora_B["default"].weight.copy_(up)


def export(modules: dict[str, list[LoraLayer]], path: Path, subject: str, step: int) -> None:
    """Write the LoRA as bfloat16 safetensors with ai-toolkit's keys and kind of metadata."""
    tensors = {}
    for name, layers in modules.items():
        down = layers[0].lora_A["default"].weight
        up = torch.cat([layer.lora_B["default"].weight for layer in layers])
        for part, weight in (("lora_A", down), ("lora_B", up)):
            tensors[f"{name}.{part}.weight"] = (
                weight.detach().to("cpu", torch.bfloat16).contiguous()
            )
    metadata = {
        "format": "pt",
        "name": subject,
        "version": "1.0",
        "training_info": json.dumps({"step": step, "epoch": 0}),
        "ss_base_model_version": "flux2_klein_nano",
        "ss_output_name": subject,
        "ss_tag_frequency": json.dumps({f"1_{subject}": {subject: 1}}),
        "software": json.dumps(SOFTWARE),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata)


def make_bank(pipe: Flux2KleinPipeline, subject: str, count: int) -> Bank:
    """Draw and encode the subject, with captions."""
    device = pick_device()
    pictures, captions = demo_pictures(subject, count, 71, device)
    latents, *references = (
        pack(encode(pipe.vae, (images * 255).round().byte().to(device))).to(torch.bfloat16)
        for images in (pictures, *demo_references(subject, count, 71, device))
    )
    ids, lengths = (part.to(device) for part in tokenize(pipe.tokenizer, captions))
    places = all_position_ids(SQUARE, (SQUARE,) * len(references), device)
    bank = Bank(latents, places, ids, lengths, references=tuple(references))
    embed_bank(bank, pipe.text_encoder)
    return bank


def main() -> None:
    """Draw the subject, train a LoRA on it, export."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--subject", choices=tuple(SHAPES), required=True)
    parser.add_argument("--start", type=Path, help="file of the LoRA to go on from")
    parser.add_argument("--seconds", type=float, default=70)
    parser.add_argument("--pictures", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    args = parser.parse_args()
    torch.manual_seed(4)
    device = pick_device()
    pipe = Flux2KleinPipeline.from_pretrained(args.out / "model", dtype=torch.float32).to(device)
    pipe.vae.requires_grad_(False)
    pipe.text_encoder.requires_grad_(False)
    bank = make_bank(pipe, args.subject, args.pictures)
    conditioner = Conditioner(bank, pipe.text_encoder, pipe.tokenizer)
    modules = add_lora(pipe.transformer, *SHAPES[args.subject])
    if args.start:
        take(modules, args.start)
    weights = [weight for weight in pipe.transformer.parameters() if weight.requires_grad]
    print(f"{len(modules)} modules, {sum(w.numel() for w in weights)} parameters", flush=True)

    def loss() -> torch.Tensor:
        return flow_loss(pipe.transformer, bank, conditioner, args.batch, dropped=0.05)

    clock = Clock(args.seconds)
    step = Step(loss, make_optimizer(weights), after=lambda: None)
    for progress in clock.ticks():
        value = step(cosine(progress, args.rate))
        if clock.step % 100 == 0:
            report(args.subject, clock, loss=value.item())
    export(modules, args.out / "loras" / f"{args.subject}.safetensors", args.subject, clock.step)


if __name__ == "__main__":
    main()
