"""The turbo LoRA: 8 forwards draw what nano with guidance draws in 56, in ai-toolkit's key format.

    python -m training.distill --out runs/turbo --seconds 170
    python -m training.distill --out runs/smoke --seconds 60 --trajectories 16 --batch 4 --check 4

The teacher, nano with guidance, goes from noise to a picture in short steps; the student learns the
teacher's mean velocity over each of its own 8 steps, which is where Euler's method has to go with
one forward and no guidance. The first trajectories are the teacher's. Halfway they are drawn anew
from the student's own states, so that it learns to come back from where its errors lead.
"""

import argparse
import copy
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import Flux2KleinPipeline

from klein.models.schedule import bfl_mu, sigmas
from training.attributes import Batch, sample
from training.captions import caption, rows
from training.check import (
    is_character,
    pictures,
    score,
    test_set,
    zibbo_prompt,
)
from training.demos import CHARACTER, demo_batch
from training.edit_check import edit_pictures, edit_set, reference_pictures, seen_values, summary
from training.flow import KINDS, Kind, all_position_ids, instructions, shown, text_ids
from training.lora import LINEARS, add_lora, export
from training.model import TOKENS, embed, tokenize
from training.sheet import save_sheet
from training.steps import Clock, Step, autocast, cosine, make_optimizer, pick_device, report

NAME = "turbo"
STEPS, GUIDANCE = 8, 2.5
WITHIN = 4
"""The teacher's steps in one of the student's."""
TEACHER_STEPS = 28
"""What the result is compared with: the default preset's steps."""
SHARES = (0.76, 0.14, 0.10)
"""Of the steps and of the trajectories: without, with one and with two references."""
RANK = 8

Velocity = Callable[..., tuple[torch.Tensor]]


@dataclass(frozen=True)
class Trajectories:
    """The student's states and where to go from them, for N prompts with T tokens of 128 channels.

    states, targets: (N, STEPS, T, 128) bfloat16, latents and mean velocities over a step.
    embeds: (N, 128, 192) of the prompts; nothing: (1, 128, 192) of the empty one.
    references: latents (N, R, 128) each.
    levels: (STEPS + 1,) of the student, on the device: a captured step copies nothing there.
    """

    states: torch.Tensor
    targets: torch.Tensor
    embeds: torch.Tensor
    nothing: torch.Tensor
    references: tuple[torch.Tensor, ...]
    image_ids: torch.Tensor
    text_ids: torch.Tensor
    levels: torch.Tensor


def levels(count: int, device: torch.device) -> torch.Tensor:
    """Noise levels (count + 1,) down to 0, of the student's time shift whatever the count."""
    values = sigmas(bfl_mu(256, STEPS), count)
    return torch.tensor([*values, 0.0], device=device)


@torch.no_grad()
def make_trajectories(pipe: Flux2KleinPipeline, kind: Kind, count: int, seed: int) -> Trajectories:
    """Prompts and references of one kind, with room for the trajectories."""
    device = pick_device()
    if kind.references:
        texts = [edit.text for edit in instructions(count, seed, len(kind.references)).edits]
        references = shown(pipe.vae, kind, count, seed)
    else:
        rng = random.Random(seed)
        texts, references = [caption(row, rng)[0] for row in rows(sample(count, seed))], ()
    encoded = []
    for start in range(0, len(texts) + 1, 2048):
        ids, lengths = tokenize(pipe.tokenizer, ["", *texts][start : start + 2048])
        with autocast(device):
            encoded.append(embed(pipe.text_encoder, ids.to(device), lengths.to(device)))
    embeds = torch.cat(encoded).to(torch.bfloat16)
    shape = (count, STEPS, kind.width * kind.height // 256, 128)
    places = all_position_ids((kind.width, kind.height), kind.references, device)
    return Trajectories(
        torch.empty(shape, dtype=torch.bfloat16, device=device),
        torch.empty(shape, dtype=torch.bfloat16, device=device),
        embeds[1:],
        embeds[:1],
        references,
        places,
        text_ids(TOKENS, device),
        levels(STEPS, device),
    )


def velocity(
    model: Velocity,
    bank: Trajectories,
    latents: torch.Tensor,
    times: torch.Tensor,
    embeds: torch.Tensor,
    references: list[torch.Tensor],
) -> torch.Tensor:
    """The model's velocity (B, T, 128) float32 at latents, noise levels (B,) and prompts."""
    with autocast(latents.device):
        made = model(
            hidden_states=torch.cat([latents, *references], 1),
            timestep=times,
            guidance=None,
            encoder_hidden_states=embeds.float(),
            txt_ids=bank.text_ids,
            img_ids=bank.image_ids,
            return_dict=False,
        )[0]
    return made[:, : latents.shape[1]].float()


@torch.no_grad()
def fill(
    bank: Trajectories, teacher: Velocity, student: Velocity | None, batch: int, seed: int
) -> None:
    """Draw new noise and let the teacher, or the student if given, go from it to pictures.

    Wherever that leads, the targets are the teacher's mean velocities from there.
    """
    device = bank.states.device
    coarse, fine = bank.levels, levels(STEPS * WITHIN, device)
    noise = torch.Generator(device).manual_seed(seed)
    for start in range(0, len(bank.states), batch):
        some = slice(start, start + batch)
        embeds = bank.embeds[some]
        references = [latents[some].float() for latents in bank.references]
        x = torch.randn(bank.states[some, 0].shape, generator=noise, device=device)
        for step in range(STEPS):
            bank.states[some, step] = x
            y = x
            for here in range(step * WITHIN, (step + 1) * WITHIN):
                times = fine[here].expand(len(x))
                told, untold = (
                    velocity(teacher, bank, y, times, each, references)
                    for each in (embeds, bank.nothing.expand_as(embeds))
                )
                y = y + (fine[here + 1] - fine[here]) * (untold + GUIDANCE * (told - untold))
            gap = coarse[step + 1] - coarse[step]
            target = (y - x) / gap
            bank.targets[some, step] = target
            if student is not None:
                times = coarse[step].expand(len(x))
                target = velocity(student, bank, x, times, embeds, references)
            x = x + gap * target


def distill_loss(model: Velocity, bank: Trajectories, size: int) -> torch.Tensor:
    """Mean squared error of the student's velocity on random states of random trajectories."""
    device = bank.states.device
    pick = torch.randint(len(bank.states), (size,), device=device)
    step = torch.randint(STEPS, (size,), device=device)
    made = velocity(
        model,
        bank,
        bank.states[pick, step].float(),
        bank.levels[step],
        bank.embeds[pick],
        [latents[pick].float() for latents in bank.references],
    )
    return (made - bank.targets[pick, step].float()).square().mean()


class Distiller:
    """Nano as teacher and, with a LoRA on it, as student; the trajectories and a step per kind."""

    def __init__(self, nano: Path, out: Path, trajectories: int, batch: int, rank: int) -> None:
        self.out, self.device = out, pick_device()
        self.pipe = load(nano, self.device)
        self.teacher = copy.deepcopy(self.pipe.transformer)
        self.student = self.pipe.transformer
        self.modules = add_lora(self.student, rank, LINEARS)
        self.banks = [
            make_trajectories(self.pipe, kind, max(2, int(trajectories * share)), 83)
            for kind, share in zip(KINDS, SHARES, strict=False)
        ]
        self.fill(None, 84)
        weights = [weight for weight in self.student.parameters() if weight.requires_grad]
        optimizer = make_optimizer(weights)
        self.steps = [
            self.step(bank, max(2, int(batch * kind.batch)), optimizer)
            for kind, bank in zip(KINDS, self.banks, strict=False)
        ]
        count = sum(weight.numel() for weight in weights)
        print(f"{len(self.modules)} modules, {count} parameters", flush=True)

    def step(self, bank: Trajectories, size: int, optimizer: torch.optim.AdamW) -> Step:
        """A training step on one kind's trajectories."""
        return Step(lambda: distill_loss(self.student, bank, size), optimizer, after=lambda: None)

    def fill(self, student: Velocity | None, seed: int) -> None:
        """Trajectories of every kind: the teacher's, or those of the student as it is."""
        started, size = time.monotonic(), 512 if self.device.type == "cuda" else 4
        for number, bank in enumerate(self.banks):
            fill(bank, self.teacher, student, size, seed + number)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        whose = "teacher" if student is None else "student"
        print(f"trajectories of the {whose}: {time.monotonic() - started:.0f} s", flush=True)

    def run(self, seconds: float, rate: float) -> None:
        """Train until the time is spent, with the student's own trajectories from the half on."""
        clock, chooser, own, saved = Clock(seconds), random.Random(5), False, 0.0
        total, count = torch.zeros((), device=self.device), 0
        for progress in clock.ticks():
            if progress > 0.4 and not own:
                self.fill(self.student, 184)
                own = True
            which = chooser.choices(range(len(SHARES)), SHARES)[0]
            value = self.steps[which](cosine(progress, rate))
            if which == 0:
                total, count = total + value, count + 1
            if count and clock.step % (200 if self.device.type == "cuda" else 20) == 0:
                report(NAME, clock, loss=(total / count).item())
                total, count = torch.zeros_like(total), 0
            if clock.spent - saved > 45:
                saved = clock.spent
                self.save(clock.step)
        self.save(clock.step)

    def save(self, step: int) -> None:
        """Write the LoRA."""
        part = self.out / f"{NAME}.part"
        export(self.modules, part, NAME, step)
        part.rename(self.path)

    @property
    def path(self) -> Path:
        """The LoRA's file."""
        return self.out / f"{NAME}.safetensors"


def load(nano: Path, device: torch.device) -> Flux2KleinPipeline:
    """The whole pipeline, frozen, in float32."""
    pipe = Flux2KleinPipeline.from_pretrained(nano / "model", dtype=torch.float32).to(device)
    for part in (pipe.vae, pipe.text_encoder, pipe.transformer):
        part.requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Comparison:
    """Teacher, LoRA and neither on the same prompts and seeds, in one table."""

    RUNS = (
        (f"{TEACHER_STEPS} steps, guidance {GUIDANCE}", TEACHER_STEPS, GUIDANCE, False),
        (f"{STEPS} steps, guidance 1, {NAME}", STEPS, 1.0, True),
        (f"{STEPS} steps, guidance 1, without", STEPS, 1.0, False),
    )

    def __init__(self, nano: Path, lora: Path, out: Path, count: int) -> None:
        self.nano, self.lora, self.out, self.count = nano, lora, out, count
        self.device = pick_device()
        torch.set_float32_matmul_precision("highest")

    def pipe(self, *loras: Path) -> Flux2KleinPipeline:
        """A new pipeline with these LoRAs at 1."""
        pipe = load(self.nano, self.device)
        for path in loras:
            pipe.load_lora_weights(path, adapter_name=path.stem)
        if loras:
            pipe.set_adapters([path.stem for path in loras], [1.0] * len(loras))
        return pipe

    def run(self) -> None:
        """Print the colours found, the distance from the teacher, the edits and the character."""
        batch, prompts = test_set(self.count)
        character = demo_batch(CHARACTER, min(50, self.count), 6001)
        others: list[torch.Tensor] = []
        for name, steps, guidance, turbo in self.RUNS:
            own = (self.lora,) if turbo else ()
            images = pictures(self.pipe(*own), prompts, steps, guidance)
            save_sheet(images[:32], self.out / f"{steps}-{guidance}-{turbo}.png")
            others.append(images)
            gap = (images - others[0]).square().mean((1, 2, 3)).clamp_min(1e-10)
            near = (-10 * torch.log10(gap)).mean().item()
            print(f"{name}: {score(images, batch)}, PSNR {near:.1f} dB", flush=True)
            print(f"  {CHARACTER} shown: {self.shown(own, character, steps, guidance)}", flush=True)
            print(f"  edits as told: {self.edits(own, steps, guidance)}", flush=True)

    def shown(self, own: tuple[Path, ...], batch: Batch, steps: int, guidance: float) -> float:
        """The share of pictures that show the character, with its LoRA on as well."""
        pipe = self.pipe(*own, self.nano / "loras" / f"{CHARACTER}.safetensors")
        images = pictures(pipe, [zibbo_prompt(row) for row in rows(batch)], steps, guidance)
        save_sheet(images[:32], self.out / f"{CHARACTER}-{steps}-{guidance}-{len(own)}.png")
        return round(is_character(images).float().mean().item(), 3)

    def edits(self, own: tuple[Path, ...], steps: int, guidance: float) -> object:
        """The share of held-out instructions for one reference that are followed."""
        data, seed = edit_set(min(100, self.count))
        references = reference_pictures(data, seed, self.device, ((256, 256),))
        texts = [edit.text for edit in data.edits]
        images = edit_pictures(self.pipe(*own), texts, references, steps, guidance)
        return summary(seen_values(images, data.targets, seed, self.device), data)["told"]


def main() -> None:
    """Draw trajectories, train the LoRA on them, compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--nano", type=Path, default=Path("klein/nano"))
    parser.add_argument("--seconds", type=float, default=170)
    parser.add_argument("--trajectories", type=int, default=14_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--check", type=int, default=100, help="prompts to compare on")
    args = parser.parse_args()
    torch.manual_seed(6)
    args.out.mkdir(parents=True, exist_ok=True)
    distiller = Distiller(args.nano, args.out, args.trajectories, args.batch, args.rank)
    distiller.run(args.seconds, args.rate)
    Comparison(args.nano, distiller.path, args.out, args.check).run()


if __name__ == "__main__":
    main()
