"""The transformer: flow matching on encoded drawings and their captions.

    python -m training.flow --out runs/nano --seconds 840

Logit-normal timesteps with the FLUX.1 shift, 10 % dropped captions, AdamW, cosine, EMA. Most steps
are 256x256 pictures with 128 text tokens; the others keep further sizes and text lengths alive.
"""

import argparse
import copy
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2
from transformers import Qwen2Tokenizer, Qwen3ForCausalLM

from training.attributes import part, sample
from training.captions import caption, rows
from training.model import TOKENS, build_transformer, embed, save_pipeline, tokenize
from training.steps import (
    Clock,
    Step,
    autocast,
    cosine,
    make_optimizer,
    pick_device,
    report,
    save_atomically,
)
from training.text import load_text
from training.vae import draw_bank, encode

DROPPED = 0.10
EMA_RATE = 0.001


@dataclass(frozen=True)
class Kind:
    """One kind of step: picture size, text tokens, relative batch size, share of the steps."""

    width: int
    height: int
    tokens: int
    batch: float
    share: float


KINDS = (
    Kind(256, 256, TOKENS, 1.0, 0.88),
    Kind(256, 384, TOKENS, 0.375, 0.03),
    Kind(384, 256, TOKENS, 0.375, 0.03),
    Kind(192, 256, TOKENS, 0.5, 0.015),
    Kind(384, 384, TOKENS, 0.25, 0.015),
    Kind(512, 512, TOKENS, 0.125, 0.01),
    Kind(256, 256, 64, 0.5, 0.01),
    Kind(256, 256, 512, 0.25, 0.01),
)


@dataclass
class Bank:
    """Encoded pictures with captions: latents (N, T, 128), ids (N * C, 128), lengths (N * C,)."""

    latents: torch.Tensor
    image_ids: torch.Tensor
    ids: torch.Tensor
    lengths: torch.Tensor
    embeds: torch.Tensor | None = None


def flux_shift(tokens: int) -> float:
    """FLUX.1's time shift mu for a number of image tokens."""
    return 0.5 + 0.65 * (tokens - 256) / (4096 - 256)


def sample_times(count: int, tokens: int, device: torch.device) -> torch.Tensor:
    """Logit-normal noise levels (N,) in 0..1, shifted by e^mu."""
    times = torch.sigmoid(torch.randn(count, device=device))
    grow = math.exp(flux_shift(tokens))
    return grow * times / (1 + (grow - 1) * times)


def position_ids(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Positions (height * width, 4) of image tokens: T, H, W, L."""
    axes = (torch.arange(1), torch.arange(height), torch.arange(width), torch.arange(1))
    return torch.cartesian_prod(*axes).to(device)


def text_ids(tokens: int, device: torch.device) -> torch.Tensor:
    """Positions (tokens, 4) of text tokens."""
    axes = (torch.arange(1), torch.arange(1), torch.arange(1), torch.arange(tokens))
    return torch.cartesian_prod(*axes).to(device)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(N, 128, H, W) to tokens (N, H * W, 128)."""
    return latents.flatten(2).transpose(1, 2).contiguous()


def make_bank(
    vae: AutoencoderKLFlux2,
    tokenizer: Qwen2Tokenizer,
    kind: Kind,
    count: int,
    captions: int,
    seed: int,
) -> Bank:
    """Draw and encode `count` pictures with `captions` captions each."""
    device, values, parts = pick_device(), sample(count, seed), []
    for start in range(0, count, 4096):
        pictures = draw_bank(part(values, start, 4096), seed + start, kind.width, kind.height)
        parts.append(pack(encode(vae, pictures)).to(torch.bfloat16))
    rng = random.Random(seed)
    texts = [caption(row, rng)[0] for row in rows(values) for _ in range(captions)]
    ids, lengths = tokenize(tokenizer, texts)
    places = position_ids(kind.height // 16, kind.width // 16, device)
    return Bank(torch.cat(parts), places, ids.to(device), lengths.to(device))


def embed_bank(bank: Bank, encoder: Qwen3ForCausalLM) -> None:
    """Encode every caption of the bank once, (N * C, 128, 192) bfloat16."""
    parts = []
    with torch.no_grad(), autocast(bank.ids.device):
        for ids, lengths in zip(bank.ids.split(2048), bank.lengths.split(2048), strict=True):
            parts.append(embed(encoder, ids, lengths).to(torch.bfloat16))
    bank.embeds = torch.cat(parts)


def fit_tokens(
    ids: torch.Tensor, lengths: torch.Tensor, tokens: int, pad: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut or pad tokenised prompts (N, 128) to another length, as the pipeline would."""
    if tokens > ids.shape[1]:
        ids = torch.nn.functional.pad(ids, (0, tokens - ids.shape[1]), value=pad)
    return ids[:, :tokens], lengths.clamp_max(tokens)


class Conditioner:
    """Gives the prompt embeddings of randomly picked captions, some of them dropped."""

    def __init__(
        self, bank: Bank, encoder: Qwen3ForCausalLM, tokenizer: Qwen2Tokenizer, tokens: int = TOKENS
    ) -> None:
        self.bank, self.encoder, self.tokens = bank, encoder, tokens
        device = bank.ids.device
        self.pad = int(tokenizer.pad_token_id)
        self.text_ids = text_ids(tokens, device)
        ids, lengths = (part.to(device) for part in tokenize(tokenizer, [""]))
        ids, lengths = fit_tokens(ids, lengths, tokens, self.pad)
        with torch.no_grad():
            self.empty = embed(encoder, ids, lengths)

    def __call__(self, pictures: torch.Tensor, dropped: float) -> torch.Tensor:
        """Embeddings (B, tokens, 192) for picture indices (B,)."""
        bank, device = self.bank, pictures.device
        each = len(bank.ids) // len(bank.latents)
        pick = pictures * each + torch.randint(each, pictures.shape, device=device)
        if bank.embeds is not None and self.tokens == TOKENS:
            embeds = bank.embeds[pick].float()
        else:
            ids, lengths = fit_tokens(bank.ids[pick], bank.lengths[pick], self.tokens, self.pad)
            with torch.no_grad():
                embeds = embed(self.encoder, ids, lengths)
        drop = torch.rand(len(pick), 1, 1, device=device) < dropped
        return torch.where(drop, self.empty, embeds)


def flow_loss(
    model: Callable[..., tuple[torch.Tensor]],
    bank: Bank,
    conditioner: Conditioner,
    size: int,
    dropped: float = DROPPED,
) -> torch.Tensor:
    """Mean squared error of the predicted velocity (noise - picture) on a random batch."""
    device = bank.latents.device
    pick = torch.randint(len(bank.latents), (size,), device=device)
    clean = bank.latents[pick].float()
    noise = torch.randn_like(clean)
    times = sample_times(size, clean.shape[1], device)
    blend = times.view(-1, 1, 1)
    with autocast(device):
        velocity = model(
            hidden_states=(1 - blend) * clean + blend * noise,
            timestep=times,
            guidance=None,
            encoder_hidden_states=conditioner(pick, dropped),
            txt_ids=conditioner.text_ids,
            img_ids=bank.image_ids,
            return_dict=False,
        )[0]
    return (velocity.float() - (noise - clean)).square().mean()


class Trainer:
    """The transformer with its optimizer, averaged weights, banks and one step per kind."""

    def __init__(self, out: Path, seconds: float, pictures: int, size: int) -> None:
        self.out, self.device = out, pick_device()
        self.tokenizer, self.encoder = load_text(out)
        self.encoder.to(self.device)
        self.vae = AutoencoderKLFlux2.from_pretrained(out / "vae", dtype=torch.float32)
        self.vae.to(self.device).eval().requires_grad_(False)
        self.model = build_transformer().to(self.device)
        self.ema = [weight.detach().clone() for weight in self.model.parameters()]
        self.optimizer = make_optimizer(list(self.model.parameters()))
        self.clock = Clock(seconds)
        self.checkpoint = out / "checkpoints/flow.pt"
        if self.checkpoint.exists():
            self.resume(seconds)
        self.steps = [self.prepare(kind, pictures, size) for kind in KINDS]

    def resume(self, seconds: float) -> None:
        """Go on from the last checkpoint."""
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema = state["ema"]
        self.clock = Clock(seconds, state["spent"], state["step"])

    def prepare(self, kind: Kind, pictures: int, size: int) -> Step:
        """Draw the bank of a kind and build (on the GPU: compile, capture) its step."""
        main = kind == KINDS[0]
        count = (
            pictures if main else max(8, pictures // 12 * 256 * 256 // (kind.width * kind.height))
        )
        bank = make_bank(
            self.vae, self.tokenizer, kind, count, 4 if main else 2, 41 + KINDS.index(kind)
        )
        if main:
            embed_bank(bank, self.encoder)
        conditioner = Conditioner(bank, self.encoder, self.tokenizer, kind.tokens)
        compiled = main and self.device.type == "cuda"
        model = torch.compile(self.model, dynamic=False) if compiled else self.model
        batch = max(2, int(size * kind.batch))
        step = Step(
            lambda: flow_loss(model, bank, conditioner, batch), self.optimizer, self.average
        )
        print(f"ready: {kind}, {count} pictures, batch {batch}", flush=True)
        return step

    def average(self) -> None:
        """Move the averaged weights a little towards the current ones."""
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, list(self.model.parameters()), EMA_RATE)

    def run(self, rate: float) -> None:
        """Train until the time is spent, saving on the way and at the end."""
        chooser, shares = random.Random(5), [kind.share for kind in KINDS]
        total, counted, saved = torch.zeros((), device=self.device), 0, self.clock.spent
        for progress in self.clock.ticks():
            which = chooser.choices(range(len(KINDS)), shares)[0]
            value = self.steps[which](cosine(progress, rate))
            if which == 0:
                total, counted = total + value, counted + 1
            if self.clock.step % 200 == 0 and counted:
                report("flow", self.clock, loss=total.item() / counted)
                total, counted = torch.zeros_like(total), 0
            if self.clock.spent - saved > 90:
                saved = self.clock.spent
                self.save()
        self.save()

    def save(self) -> None:
        """Write the checkpoint, and the pipeline with the averaged weights."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        more = {"ema": self.ema, "spent": self.clock.spent, "step": self.clock.step}
        save_atomically({**state, **more}, self.checkpoint)
        averaged = build_transformer()
        with torch.no_grad():
            for weight, mean in zip(averaged.parameters(), self.ema, strict=True):
                weight.copy_(mean)
        parts = {
            "transformer": averaged,
            "vae": copy.deepcopy(self.vae),
            "text_encoder": copy.deepcopy(self.encoder),
            "tokenizer": self.tokenizer,
        }
        save_pipeline(parts, self.out / "model")


def main() -> None:
    """Make the banks, train, export."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=840)
    parser.add_argument("--pictures", type=int, default=80_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    args = parser.parse_args()
    torch.manual_seed(3)
    Trainer(args.out, args.seconds, args.pictures, args.batch).run(args.rate)


if __name__ == "__main__":
    main()
