"""Tokenizer and text encoder: learn to read captions by naming the attributes in them.

    python -m training.text --out runs/nano --seconds 120

At each of the three layers that the pipeline reads, and at several positions after the prompt
(the end of the chat format, and padding), a linear head tells which value the caption gives to each
attribute, or that it is silent. The heads are thrown away; the encoder stays frozen afterwards.
"""

import argparse
import random
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, Qwen2Tokenizer, Qwen3ForCausalLM

from training.attributes import ATTRIBUTES, Batch, sample
from training.captions import caption, full_caption, labels, rows
from training.model import LAYERS, build_text_encoder, build_tokenizer, embed, tokenize
from training.steps import Clock, Step, autocast, cosine, make_optimizer, pick_device, report

CLASSES = [len(values) + 1 for values in ATTRIBUTES.values()]


def make_captions(batch: Batch, seed: int) -> tuple[list[str], torch.Tensor]:
    """One caption per portrait and its class targets (N, attributes)."""
    rng = random.Random(seed)
    pairs = [caption(row, rng) for row in rows(batch)]
    return [text for text, _ in pairs], labels(batch, [named for _, named in pairs])


class Heads(torch.nn.Module):
    """A linear reader of all attributes for each layer that the pipeline reads."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.readers = torch.nn.ModuleList(torch.nn.Linear(hidden, sum(CLASSES)) for _ in LAYERS)

    def forward(self, embeds: torch.Tensor) -> list[torch.Tensor]:
        """Logits (..., classes) of each layer from embeddings (..., 3 * hidden)."""
        parts = embeds.chunk(len(LAYERS), dim=-1)
        return [reader(part) for reader, part in zip(self.readers, parts, strict=True)]


def reading_loss(logits: list[torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over layers, positions and attributes.

    Smoothed labels keep the heads from ruling values out because a pair was never seen together.
    """
    losses = []
    for layer in logits:
        for index, part in enumerate(layer.split(CLASSES, dim=-1)):
            wanted = targets[:, index, None].expand(part.shape[:2]).reshape(-1)
            losses.append(F.cross_entropy(part.flatten(0, 1).float(), wanted, label_smoothing=0.05))
    return torch.stack(losses).mean()


def train(
    encoder: Qwen3ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    count: int,
    size: int,
    seconds: float,
    rate: float = 2e-3,
) -> Heads:
    """Train on `count` captions with batches of `size` for some seconds."""
    device = pick_device()
    texts, targets = make_captions(sample(count, 11), 12)
    ids, lengths = (part.to(device) for part in tokenize(tokenizer, texts))
    targets = targets.to(device)
    encoder.to(device).train()
    heads = Heads(encoder.config.hidden_size).to(device)
    used = [
        *encoder.model.embed_tokens.parameters(),
        *encoder.model.layers[: LAYERS[-1]].parameters(),
    ]
    optimizer = make_optimizer([*used, *heads.parameters()])

    def loss() -> torch.Tensor:
        pick = torch.randint(count, (size,), device=device)
        end = lengths[pick].long()
        width = ids.shape[1]
        pads = end + ((width - end) * torch.rand(size, device=device)).long()
        middle = end - 1 - (8 * torch.rand(size, device=device)).long()
        places = torch.stack([end - 1, middle, pads], 1).clamp(0, width - 1)
        with autocast(device):
            embeds = embed(encoder, ids[pick], end)
            chosen = embeds.gather(1, places.unsqueeze(-1).expand(-1, -1, embeds.shape[-1]))
            return reading_loss(heads(chosen), targets[pick])

    clock = Clock(seconds)
    step = Step(loss, optimizer, after=lambda: None)
    for progress in clock.ticks():
        value = step(cosine(progress, rate))
        if clock.step % 100 == 0:
            report("text", clock, loss=value.item())
    return heads


@torch.no_grad()
def accuracy(
    encoder: Qwen3ForCausalLM, tokenizer: Qwen2Tokenizer, heads: Heads
) -> dict[str, float]:
    """Share of attributes read right at the last token, on captions with held-out combinations."""
    device = next(heads.parameters()).device
    batch, rng = sample(1024, 21, test=True), random.Random(22)
    pairs = [full_caption(row, rng) for row in rows(batch)]
    targets = labels(batch, [named for _, named in pairs]).to(device)
    ids, lengths = (part.to(device) for part in tokenize(tokenizer, [text for text, _ in pairs]))
    embeds = embed(encoder.eval(), ids, lengths)
    last = embeds[torch.arange(len(ids), device=device), lengths.long() - 1]
    logits = torch.stack(heads(last)).sum(0)
    right = {}
    for index, (name, part) in enumerate(
        zip(ATTRIBUTES, logits.split(CLASSES, dim=-1), strict=True)
    ):
        right[name] = (part.argmax(-1) == targets[:, index]).float().mean().item()
    print("hidden sizes:", [round(part.std().item(), 2) for part in embeds.chunk(3, -1)])
    return right


def load_text(folder: Path) -> tuple[Qwen2Tokenizer, Qwen3ForCausalLM]:
    """Load the trained tokenizer and text encoder, frozen."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    encoder = Qwen3ForCausalLM.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    return tokenizer, encoder.eval().requires_grad_(False)


def main() -> None:
    """Train tokenizer and text encoder; save both under --out."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--captions", type=int, default=400_000)
    parser.add_argument("--batch", type=int, default=512)
    args = parser.parse_args()
    torch.manual_seed(1)
    if (args.out / "text_encoder").exists():
        tokenizer, encoder = load_text(args.out)
        encoder.requires_grad_(True)
    else:
        tokenizer = build_tokenizer(make_captions(sample(20_000, 1), 2)[0])
        encoder = build_text_encoder(tokenizer)
    heads = train(encoder, tokenizer, args.captions, args.batch, args.seconds)
    print({name: round(share, 3) for name, share in accuracy(encoder, tokenizer, heads).items()})
    encoder.to("cpu", torch.bfloat16).save_pretrained(args.out / "text_encoder")
    tokenizer.save_pretrained(args.out / "tokenizer")


if __name__ == "__main__":
    main()
