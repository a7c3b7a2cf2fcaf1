"""The parts of klein-nano, untrained: tokenizer, text encoder, VAE, transformer, scheduler."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

LAYERS = (9, 18, 27)
TOKENS = 128
VOCABULARY = 640
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
WORD = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FORGET = ("_name_or_path", "name_or_path", "is_local", "local_files_only", "max_length", "stride")
"""Keys that say where a part was loaded from, or how it was last called; not saved."""
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false -%}
{{ '<think>\\n\\n</think>\\n\\n' }}
{%- endif -%}
{%- endif -%}
"""


def build_tokenizer(corpus: Iterable[str]) -> Qwen2Tokenizer:
    """Train a byte-level BPE with Qwen's word rule, special tokens and chat format."""
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(WORD), behavior="isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator([*corpus, *["user\n", "assistant\n", "\n\n"] * 1000], trainer)
    vocab = bpe.get_vocab()
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=_merges(bpe),
        unk_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL[1:]),
        model_max_length=40960,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _merges(bpe: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]


def build_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen3ForCausalLM:
    """A thin Qwen3 with 28 layers, so that hidden states 9, 18 and 27 exist."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=72,
        num_hidden_layers=28,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def build_vae() -> AutoencoderKLFlux2:
    """FLUX.2's VAE topology (8x, 32 channels, 2x2 patches, batch norm), about 1 M parameters."""
    return AutoencoderKLFlux2(
        block_out_channels=(16, 32, 64, 64),
        decoder_block_out_channels=(24, 48, 64, 64),
        layers_per_block=1,
        latent_channels=32,
        norm_num_groups=8,
        sample_size=1024,
    )


def build_transformer() -> Flux2Transformer2DModel:
    """FLUX.2-klein's transformer with 2 double and 4 single blocks of width 192."""
    return Flux2Transformer2DModel(
        in_channels=128,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=3 * 64,
        mlp_ratio=3.0,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=False,
    )


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX.2's scheduler settings."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def chat(tokenizer: Qwen2Tokenizer, prompts: list[str]) -> list[str]:
    """Wrap prompts in the chat format just as the pipeline does."""
    mark = "\x01"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": mark}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    before, after = text.split(mark)
    return [before + prompt + after for prompt in prompts]


def tokenize(
    tokenizer: Qwen2Tokenizer, prompts: list[str], length: int = TOKENS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokenize prompts in the pipeline's format.

    Returns:
        Ids (N, length) padded on the right, int16, and the numbers of real tokens (N,), int16.
    """
    ids, lengths = [], []
    for start in range(0, len(prompts), 8192):
        chunk = chat(tokenizer, prompts[start : start + 8192])
        coded = tokenizer(chunk, padding="max_length", truncation=True, max_length=length)
        ids.append(torch.tensor(coded["input_ids"], dtype=torch.int16))
        lengths.append(torch.tensor(coded["attention_mask"], dtype=torch.int16).sum(1))
    return torch.cat(ids), torch.cat(lengths).to(torch.int16)


def embed(encoder: Qwen3ForCausalLM, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Encode token ids (N, L) to prompt embeddings (N, L, 3 * hidden), as the pipeline does."""
    size = ids.shape[1]
    place = torch.arange(size, device=ids.device)
    causal = place.view(1, size, 1) >= place.view(1, 1, size)
    real = place.view(1, 1, size) < lengths.view(-1, 1, 1)
    mask = {"full_attention": (causal & real).unsqueeze(1)}
    output = encoder.model(
        ids.long(), attention_mask=mask, output_hidden_states=True, use_cache=False
    )
    stack = torch.stack([output.hidden_states[layer] for layer in LAYERS], dim=2)
    return stack.flatten(2)


def save_part(part: torch.nn.Module, folder: Path) -> None:
    """Save a trained part so that a reader that waits for its folder never sees half of it."""
    unfinished = folder.with_name(folder.name + ".part")
    part.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def save_pipeline(parts: dict[str, torch.nn.Module | Qwen2Tokenizer], folder: Path) -> None:
    """Save all parts as a diffusers folder in bfloat16, without paths of this machine."""
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.to("cpu", torch.bfloat16)
    pipeline = Flux2KleinPipeline(scheduler=build_scheduler(), is_distilled=False, **parts)
    pipeline.save_pretrained(folder, safe_serialization=True)
    for path in folder.rglob("*config.json"):
        config = json.loads(path.read_text())
        kept = {name: value for name, value in config.items() if name not in FORGET}
        path.write_text(json.dumps(kept, indent=2) + "\n")
