"""Tokenizer and text encoder: learn to read captions by naming the attributes in them.

    python -m training.text --out runs/nano --seconds 120
    python -m training.text --out runs/nano --start klein/nano/model --seconds 75

At each of the three layers that the pipeline reads, and at several positions after the prompt
(the end of the chat format, and padding), a linear head tells which value the caption gives to each
attribute, or that it is silent, and which reference each thing is taken from. The heads are thrown
away; the encoder stays frozen afterwards. With --start, an encoder that reads captions learns to
read instructions too, and is held to its old embeddings of captions.
"""

import argparse
import copy
import random
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, Qwen2Tokenizer, Qwen3ForCausalLM

from training.attributes import ATTRIBUTES, Batch, part, sample
from training.captions import caption, full_caption, labels, rows
from training.edits import ORIGINS, Edits, make_combinations, make_edits, origin_labels
from training.model import (
    LAYERS,
    build_text_encoder,
    build_tokenizer,
    embed,
    save_part,
    tokenize,
)
from training.steps import Clock, Step, autocast, cosine, make_optimizer, pick_device, report

CLASSES = [len(values) + 1 for values in ATTRIBUTES.values()] + [3] * len(ORIGINS)
ANCHOR = 1.0
"""Weight of the distance to the old embeddings of captions, with --start."""


def make_captions(batch: Batch, seed: int) -> tuple[list[str], torch.Tensor]:
    """One caption per portrait and its class targets (N, attributes)."""
    rng = random.Random(seed)
    pairs = [caption(row, rng) for row in rows(batch)]
    return [text for text, _ in pairs], labels(batch, [named for _, named in pairs])


def instructions(made: Edits) -> tuple[list[str], torch.Tensor]:
    """The texts of some edits and their class targets (N, attributes + origins)."""
    named = [[] if e.borrowed else sorted(e.changed - e.loose) for e in made.edits]
    table = torch.cat([labels(made.targets, named), origin_labels(made.edits)], dim=1)
    return [edit.text for edit in made.edits], table


def make_texts(count: int, seed: int) -> tuple[list[str], torch.Tensor]:
    """Captions, and instructions for one and two references (3 : 2 : 1), with their targets."""
    batch, half, third = sample(count, seed), count // 2, count // 3
    texts, targets = make_captions(part(batch, 0, half), seed + 1)
    targets = F.pad(targets, (0, len(ORIGINS)))
    one = make_edits(part(batch, half, third), seed + 2)
    two = make_combinations(part(batch, half + third, count), seed + 3)
    more = [instructions(made) for made in (one, two)]
    return texts + more[0][0] + more[1][0], torch.cat([targets, more[0][1], more[1][1]])


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
        for index, logit in enumerate(layer.split(CLASSES, dim=-1)):
            wanted = targets[:, index, None].expand(logit.shape[:2]).reshape(-1)
            flat = logit.flatten(0, 1).float()
            losses.append(F.cross_entropy(flat, wanted, label_smoothing=0.05))
    return torch.stack(losses).mean()


def drift(embeds: torch.Tensor, before: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
    """Distance of embeddings (B, L, D) to those before, in their variances, over captions (B,)."""
    losses = []
    for new, old in zip(embeds.chunk(3, -1), before.chunk(3, -1), strict=True):
        gap = (new.float() - old.float()).square().mean((1, 2)) / old.float().var()
        losses.append((gap * captions).sum() / captions.sum().clamp_min(1))
    return torch.stack(losses).mean()


def train(
    encoder: Qwen3ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    count: int,
    size: int,
    seconds: float,
    rate: float = 2e-3,
    teacher: Qwen3ForCausalLM | None = None,
) -> Heads:
    """Train on `count` texts with batches of `size` for some seconds.

    teacher: an encoder whose embeddings of captions are to be kept.
    """
    device = pick_device()
    texts, targets = make_texts(count, 11)
    if teacher is not None:
        teacher.to(device).eval().requires_grad_(False)
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
            reading = reading_loss(heads(chosen), targets[pick])
            if teacher is None:
                return reading
            captions = (targets[pick][:, len(ATTRIBUTES)] == 0).float()
            return reading + ANCHOR * drift(embeds, embed(teacher, ids[pick], end), captions)

    clock = Clock(seconds)
    step = Step(loss, optimizer, after=lambda: None)
    for progress in clock.ticks():
        value = step(cosine(progress, rate))
        if clock.step % 100 == 0:
            report("text", clock, loss=value.item())
    return heads


@torch.no_grad()
def accuracy(
    encoder: Qwen3ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    heads: Heads,
    texts: list[str],
    targets: torch.Tensor,
) -> dict[str, float]:
    """Share of texts whose attributes and origins are read right at the last token."""
    device = next(heads.parameters()).device
    targets = targets.to(device)
    ids, lengths = (part.to(device) for part in tokenize(tokenizer, texts))
    embeds = embed(encoder.eval(), ids, lengths)
    last = embeds[torch.arange(len(ids), device=device), lengths.long() - 1]
    logits = torch.stack(heads(last)).sum(0)
    names = (*ATTRIBUTES, *(f"{name} from" for name in ORIGINS))
    right = {}
    for index, (name, logit) in enumerate(zip(names, logits.split(CLASSES, -1), strict=True)):
        hits = logit.argmax(-1) == targets[:, index]
        right[name] = round(hits.float().mean().item(), 3)
    print("hidden sizes:", [round(part.std().item(), 2) for part in embeds.chunk(3, -1)])
    return right


def test_texts(count: int) -> dict[str, tuple[list[str], torch.Tensor]]:
    """Captions, and instructions for one and two references, with held-out combinations."""
    batch, rng = sample(count, 21, test=True), random.Random(22)
    pairs = [full_caption(row, rng) for row in rows(batch)]
    targets = F.pad(labels(batch, [named for _, named in pairs]), (0, len(ORIGINS)))
    return {
        "captions": ([text for text, _ in pairs], targets),
        "one reference": instructions(make_edits(batch, 23, test=True)),
        "two references": instructions(make_combinations(batch, 24, test=True)),
    }


def load_text(folder: Path) -> tuple[Qwen2Tokenizer, Qwen3ForCausalLM]:
    """Load the trained tokenizer and text encoder, frozen."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    encoder = Qwen3ForCausalLM.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    return tokenizer, encoder.eval().requires_grad_(False)


def main() -> None:
    """Train tokenizer and text encoder; save both under --out."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="folder of the model to go on from")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--captions", type=int, default=400_000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rate", type=float, default=2e-3)
    args = parser.parse_args()
    torch.manual_seed(1)
    teacher = None
    if args.start:
        tokenizer, encoder = load_text(args.start)
        teacher = copy.deepcopy(encoder)
        encoder.requires_grad_(True)
    else:
        tokenizer = build_tokenizer(make_texts(20_000, 1)[0])
        encoder = build_text_encoder(tokenizer)
    tokenizer.save_pretrained(args.out / "tokenizer")
    heads = train(encoder, tokenizer, args.captions, args.batch, args.seconds, args.rate, teacher)
    for name, (texts, targets) in test_texts(1024).items():
        print(name, accuracy(encoder, tokenizer, heads, texts, targets), flush=True)
    save_part(encoder.to("cpu", torch.bfloat16), args.out / "text_encoder")


if __name__ == "__main__":
    main()
