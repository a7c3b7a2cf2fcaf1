"""The transformer: flow matching on encoded drawings and their captions.

    python -m training.flow --out runs/nano --seconds 840
    python -m training.flow --out runs/nano --start klein/nano/model --seconds 370

Logit-normal timesteps with the FLUX.1 shift, 10 % dropped captions, AdamW, cosine, EMA. Most steps
are 256x256 pictures with 128 text tokens; the others keep further sizes and text lengths alive.
Four steps in ten are edits: the encoded references follow the picture's tokens, as in the pipeline.
"""

import argparse
import copy
import math
import multiprocessing
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from transformers import Qwen2Tokenizer, Qwen3ForCausalLM

from training.attributes import Batch, part, sample
from training.captions import caption, rows
from training.draw import with_looks
from training.edits import Edits, make_combinations, make_edits
from training.model import LAYERS, TOKENS, build_transformer, embed, save_pipeline, tokenize
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
    """One kind of step: picture size, text tokens, relative batch size, share of the steps.

    references: width and height of each reference.
    """

    width: int
    height: int
    tokens: int
    batch: float
    share: float
    references: tuple[tuple[int, int], ...] = ()


SQUARE = (256, 256)
KINDS = (
    Kind(256, 256, TOKENS, 1.0, 0.52),
    Kind(256, 256, TOKENS, 0.75, 0.12, (SQUARE,)),
    Kind(256, 256, TOKENS, 0.5, 0.17, (SQUARE, SQUARE)),
    Kind(256, 384, TOKENS, 0.375, 0.02),
    Kind(384, 256, TOKENS, 0.375, 0.02),
    Kind(192, 256, TOKENS, 0.5, 0.01),
    Kind(384, 384, TOKENS, 0.25, 0.01),
    Kind(512, 512, TOKENS, 0.125, 0.01),
    Kind(256, 256, 64, 0.5, 0.01),
    Kind(256, 256, 512, 0.25, 0.01),
    Kind(256, 256, TOKENS, 0.75, 0.045, ((128, 128),)),
    Kind(256, 256, TOKENS, 0.75, 0.01, ((192, 256),)),
    Kind(256, 384, TOKENS, 0.5, 0.01, ((256, 384),)),
    Kind(384, 256, TOKENS, 0.5, 0.01, ((384, 256),)),
    Kind(256, 256, TOKENS, 0.75, 0.025, (SQUARE, (128, 128))),
    Kind(256, 256, TOKENS, 0.75, 0.01, ((128, 128), (128, 128))),
)
MAIN = 3
"""The first kinds are compiled and share their portraits."""


@dataclass
class Bank:
    """Encoded pictures with captions: latents (N, T, 128), ids (N * C, 128), lengths (N * C,).

    references: latents (N, R, 128) of the references that belong to the pictures, in their order.
    image_ids: positions of the picture's and all references' tokens.
    emphasis: weight of each token's loss, (N, T), mean 1 over a picture; None for equal weights.
    """

    latents: torch.Tensor
    image_ids: torch.Tensor
    ids: torch.Tensor
    lengths: torch.Tensor
    embeds: torch.Tensor | None = None
    references: tuple[torch.Tensor, ...] = ()
    emphasis: torch.Tensor | None = None


def flux_shift(tokens: int) -> float:
    """FLUX.1's time shift mu for a number of image tokens."""
    return 0.5 + 0.65 * (tokens - 256) / (4096 - 256)


def sample_times(count: int, tokens: int, device: torch.device) -> torch.Tensor:
    """Logit-normal noise levels (N,) in 0..1, shifted by e^mu."""
    times = torch.sigmoid(torch.randn(count, device=device))
    grow = math.exp(flux_shift(tokens))
    return grow * times / (1 + (grow - 1) * times)


def position_ids(height: int, width: int, device: torch.device, time: int = 0) -> torch.Tensor:
    """Positions (height * width, 4) of image tokens: T, H, W, L."""
    axes = (torch.tensor([time]), torch.arange(height), torch.arange(width), torch.arange(1))
    return torch.cartesian_prod(*axes).to(device)


def all_position_ids(
    size: tuple[int, int], references: tuple[tuple[int, int], ...], device: torch.device
) -> torch.Tensor:
    """Positions of the tokens of a picture (T 0) and its references (T 10, 20); sizes in pixels."""
    parts = [
        position_ids(height // 16, width // 16, device, 10 * number)
        for number, (width, height) in enumerate((size, *references))
    ]
    return torch.cat(parts)


def text_ids(tokens: int, device: torch.device) -> torch.Tensor:
    """Positions (tokens, 4) of text tokens."""
    axes = (torch.arange(1), torch.arange(1), torch.arange(1), torch.arange(tokens))
    return torch.cartesian_prod(*axes).to(device)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(N, 128, H, W) to tokens (N, H * W, 128)."""
    return latents.flatten(2).transpose(1, 2).contiguous()


def painted(
    vae: AutoencoderKLFlux2,
    values: Batch,
    seed: int,
    size: tuple[int, int] = SQUARE,
    looks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draw and encode portraits: latents (N, T, 128), bfloat16.

    The same seed gives the same place, tilt and parting, whatever the values and the size.
    """
    parts = []
    for start in range(0, len(values["who"]), 2048):
        pictures = draw_bank(part(values, start, 2048), seed + start, *size)
        if looks is not None:
            dressed = with_looks(pictures.float() / 255, looks[start : start + 2048])
            pictures = (dressed * 255).round().byte()
        parts.append(pack(encode(vae, pictures)).to(torch.bfloat16))
    return torch.cat(parts)


@lru_cache(maxsize=3)
def portraits(
    vae: AutoencoderKLFlux2, count: int, seed: int, size: tuple[int, int]
) -> tuple[Batch, torch.Tensor]:
    """Random portraits and their latents; banks of one seed share them."""
    values = sample(count, seed)
    return values, painted(vae, values, seed, size)


def make_bank(
    vae: AutoencoderKLFlux2,
    tokenizer: Qwen2Tokenizer,
    kind: Kind,
    count: int,
    captions: int,
    seed: int,
) -> Bank:
    """Draw and encode `count` pictures: with `captions` captions each, or edits of references."""
    device, size = pick_device(), (kind.width, kind.height)
    references: tuple[torch.Tensor, ...] = ()
    emphasis = None
    if kind.references:
        made = instructions(count, seed, len(kind.references))
        latents = painted(vae, made.targets, seed, size, made.looks)
        emphasis = changed_more(latents, portraits(vae, count, seed, size)[1])
        references = shown(vae, kind, count, seed)
        texts = [edit.text for edit in made.edits]
    else:
        values, latents = portraits(vae, count, seed, size)
        rng = random.Random(seed)
        texts = [caption(row, rng)[0] for row in rows(values) for _ in range(captions)]
    ids, lengths = tokenize(tokenizer, texts)
    places = all_position_ids(size, kind.references, device)
    return Bank(latents, places, ids.to(device), lengths.to(device), None, references, emphasis)


@lru_cache(maxsize=2)
def instructions(count: int, seed: int, references: int) -> Edits:
    """Instructions on one or two references for the portraits of a seed."""
    make = make_combinations if references == 2 else make_edits
    return make(sample(count, seed), seed)


def shown(vae: AutoencoderKLFlux2, kind: Kind, count: int, seed: int) -> tuple[torch.Tensor, ...]:
    """The latents of a kind's references, in their order."""
    made = instructions(count, seed, len(kind.references))
    if made.others is None:
        return (portraits(vae, count, seed, kind.references[0])[1],)
    both = {
        size: (
            portraits(vae, count, seed, size)[1],
            painted(vae, made.others, seed + 7, size, made.looks),
        )
        for size in dict.fromkeys(kind.references)
    }
    person = torch.tensor([edit.person for edit in made.edits], device=pick_device())
    return tuple(
        torch.where((person == number).view(-1, 1, 1), *both[size])
        for number, size in enumerate(kind.references, start=1)
    )


def changed_more(latents: torch.Tensor, person: torch.Tensor) -> torch.Tensor:
    """Weights (N, T) of mean 1: a token that an instruction changes counts five times as much."""
    changed = (latents.float() - person.float()).square().mean(-1) > 0.1
    weights = 1 + 4 * changed.float()
    return weights / weights.mean(1, keepdim=True)


@torch.no_grad()
def embed_bank(bank: Bank, encoder: Qwen3ForCausalLM) -> None:
    """Encode every caption of the bank, (N * C, 128, 192) bfloat16; in place if done before."""
    if bank.embeds is None:
        width = len(LAYERS) * encoder.config.hidden_size
        shape = (*bank.ids.shape, width)
        bank.embeds = torch.empty(shape, dtype=torch.bfloat16, device=bank.ids.device)
    with autocast(bank.ids.device):
        for some, ids, lengths in zip(
            bank.embeds.split(2048), bank.ids.split(2048), bank.lengths.split(2048), strict=True
        ):
            some.copy_(embed(encoder, ids, lengths))


def fit_tokens(
    ids: torch.Tensor, lengths: torch.Tensor, tokens: int, pad: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut or pad tokenised prompts (N, 128) to another length, as the pipeline would."""
    if tokens > ids.shape[1]:
        ids = torch.nn.functional.pad(ids, (0, tokens - ids.shape[1]), value=pad)
    return ids[:, :tokens], lengths.clamp_max(tokens)


def shares(edits: float) -> list[float]:
    """Shares of the kinds when that part of all steps has references."""
    own = {
        wanted: sum(kind.share for kind in KINDS if bool(kind.references) == wanted)
        for wanted in (False, True)
    }
    parts = {False: 1 - edits, True: edits}
    return [
        kind.share * parts[bool(kind.references)] / own[bool(kind.references)] for kind in KINDS
    ]


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
        self.nothing = fit_tokens(ids, lengths, tokens, self.pad)
        with torch.no_grad():
            self.empty = embed(encoder, *self.nothing)

    @torch.no_grad()
    def refresh(self) -> None:
        """Encode again, in place, after the encoder's weights changed."""
        self.empty.copy_(embed(self.encoder, *self.nothing))
        if self.bank.embeds is not None:
            embed_bank(self.bank, self.encoder)

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
    references = [latents[pick].float() for latents in bank.references]
    with autocast(device):
        velocity = model(
            hidden_states=torch.cat([(1 - blend) * clean + blend * noise, *references], 1),
            timestep=times,
            guidance=None,
            encoder_hidden_states=conditioner(pick, dropped),
            txt_ids=conditioner.text_ids,
            img_ids=bank.image_ids,
            return_dict=False,
        )[0][:, : clean.shape[1]]
    errors = (velocity.float() - (noise - clean)).square()
    return (errors if bank.emphasis is None else errors * bank.emphasis[pick].unsqueeze(-1)).mean()


def wait_for(folder: Path, seconds: float = 600) -> None:
    """Wait for a part that may still be training.

    Raises:
        FileNotFoundError: it did not come.
    """
    deadline = time.monotonic() + seconds
    while not folder.exists():
        if time.monotonic() > deadline:
            raise FileNotFoundError(f"{folder} is missing; run the trainings before this one first")
        time.sleep(1)


COMPILERS: list[BaseProcess] = []
"""Processes that fill the compiler's cache while the pictures are drawn."""


def compile_ahead(start: Path, size: int, kind: Kind) -> None:
    """Compile one kind's step on a few pictures."""
    Trainer(start, start, 1, 16, size, (kind,))


class Trainer:
    """The transformer with its optimizer, averaged weights, banks and one step per kind.

    Args:
        out: where the trained parts are (once they are ready) and the model goes.
        start: folder of the parts to begin with: `out`, or a model to go on from.
        seconds: of training.
        pictures: number of pictures of the main kind.
        size: batch size of the main kind.
        kinds: of steps.
    """

    def __init__(
        self,
        out: Path,
        start: Path,
        seconds: float,
        pictures: int,
        size: int,
        kinds: tuple[Kind, ...] = KINDS,
    ) -> None:
        self.out, self.device = out, pick_device()
        self.tokenizer, self.encoder = load_text(start)
        self.encoder.to(self.device)
        self.vae = AutoencoderKLFlux2.from_pretrained(start / "vae", dtype=torch.float32)
        self.vae.to(self.device).eval().requires_grad_(False)
        self.conditioners: list[Conditioner] = []
        self.edits: dict[int, Bank] = {}
        self.model = build_transformer().to(self.device)
        if (start / "transformer").exists():
            known = Flux2Transformer2DModel.from_pretrained(start / "transformer")
            self.model.load_state_dict(known.state_dict())
        self.ema = [weight.detach().clone() for weight in self.model.parameters()]
        self.optimizer = make_optimizer(list(self.model.parameters()))
        self.clock = Clock(seconds)
        self.checkpoint = out / "checkpoints/flow.pt"
        if self.checkpoint.exists():
            self.resume(seconds)
        banks = [self.bank(kind, pictures) for kind in kinds]
        for compiler in COMPILERS:
            compiler.join()
        self.steps = [self.step(*each, size) for each in zip(kinds, banks, strict=True)]
        wait_for(self.out / "vae")
        if start != out:
            self.take_encoder()

    def take_encoder(self) -> None:
        """Use the trained text encoder in place of the one that the steps were captured with."""
        wait_for(self.out / "text_encoder")
        self.encoder.load_state_dict(load_text(self.out)[1].state_dict())
        for conditioner in self.conditioners:
            conditioner.refresh()
        print("captions encoded", flush=True)

    def resume(self, seconds: float) -> None:
        """Go on from the last checkpoint."""
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema = state["ema"]
        self.clock = Clock(seconds, state["spent"], state["step"])

    def bank(self, kind: Kind, pictures: int) -> Bank:
        """The pictures of a kind; edits of the main size differ in their references alone."""
        edits = bool(kind.references) and (kind.width, kind.height) == SQUARE
        shared = edits or kind in KINDS[:MAIN]
        fewer = pictures // 16 * 256 * 256 // (kind.width * kind.height)
        count = pictures if shared else max(8, fewer)
        seed = 41 if shared else 41 + KINDS.index(kind)
        print(f"{time.monotonic():.0f} s  drawing: {kind}, {count} pictures", flush=True)
        if edits and (known := self.edits.get(len(kind.references))):
            places = all_position_ids(SQUARE, kind.references, self.device)
            return replace(known, references=shown(self.vae, kind, count, seed), image_ids=places)
        captions = 4 if kind == KINDS[0] else 2
        bank = make_bank(self.vae, self.tokenizer, kind, count, captions, seed)
        if kind.tokens == TOKENS:
            embed_bank(bank, self.encoder)
        if edits:
            self.edits[len(kind.references)] = bank
        return bank

    def step(self, kind: Kind, bank: Bank, size: int) -> Step:
        """The step of a kind; on the GPU captured, and compiled for the main kinds."""
        conditioner = Conditioner(bank, self.encoder, self.tokenizer, kind.tokens)
        self.conditioners.append(conditioner)
        compiled = kind in KINDS[:MAIN] and self.device.type == "cuda"
        model = torch.compile(self.model, dynamic=False) if compiled else self.model
        batch = max(2, int(size * kind.batch))
        step = Step(
            lambda: flow_loss(model, bank, conditioner, batch), self.optimizer, self.average
        )
        print(f"{time.monotonic():.0f} s  ready: {kind}, batch {batch}", flush=True)
        return step

    def average(self) -> None:
        """Move the averaged weights a little towards the current ones."""
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, list(self.model.parameters()), EMA_RATE)

    def run(self, rate: float, edits: float) -> None:
        """Train until the time is spent, saving on the way and at the end."""
        chooser, weights = random.Random(5), shares(edits)
        totals, counts = torch.zeros(MAIN, device=self.device), [0] * MAIN
        saved = self.clock.spent
        for progress in self.clock.ticks():
            which = chooser.choices(range(len(KINDS)), weights)[0]
            value = self.steps[which](cosine(progress, rate))
            if which < MAIN:
                totals[which] += value
                counts[which] += 1
            if self.clock.step % 200 == 0 and all(counts):
                means = (totals / torch.tensor(counts, device=self.device)).tolist()
                losses = zip(("loss", "one reference", "two references"), means, strict=True)
                report("flow", self.clock, **dict(losses))
                totals, counts = torch.zeros_like(totals), [0] * MAIN
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
        trained = self.out / "vae"
        parts = {
            "transformer": averaged,
            "vae": AutoencoderKLFlux2.from_pretrained(trained, dtype=torch.float32),
            "text_encoder": copy.deepcopy(self.encoder),
            "tokenizer": self.tokenizer,
        }
        save_pipeline(parts, self.out / "model")


def main() -> None:
    """Make the banks, train, export."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="folder of the model to go on from")
    parser.add_argument("--seconds", type=float, default=840)
    parser.add_argument("--pictures", type=int, default=80_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--edits", type=float, default=0.4, help="share of steps with references")
    args = parser.parse_args()
    torch.manual_seed(3)
    start = args.start or args.out
    if torch.cuda.is_available():
        spawn = multiprocessing.get_context("spawn")
        for kind in KINDS[:MAIN]:
            COMPILERS.append(spawn.Process(target=compile_ahead, args=(start, args.batch, kind)))
            COMPILERS[-1].start()
    trainer = Trainer(args.out, start, args.seconds, args.pictures, args.batch)
    trainer.run(args.rate, args.edits)


if __name__ == "__main__":
    main()
