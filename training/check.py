"""How good klein-nano is: pictures from the real pipeline, judged by the colours in their regions.

python -m training.check --nano klein/nano --out runs/check --count 200
python -m training.check --nano klein/nano --out runs/check --count 16 --only edits combinations
"""

import argparse
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline

from training.attributes import ATTRIBUTES, PALETTES, SKIN, Batch, Rgb, part, sample
from training.captions import Row, full_caption, rows
from training.demos import (
    CHARACTER,
    MINT,
    SKETCH,
    STYLE,
    demo_batch,
    demo_captions,
    demo_pictures,
    demo_references,
)
from training.draw import draw, with_looks
from training.edit_check import (
    combination_set,
    combination_summary,
    edit_pictures,
    edit_set,
    reference_pictures,
    seen_values,
    summary,
)
from training.flow import flux_shift
from training.model import TOKENS
from training.sheet import save_sheet
from training.steps import pick_device
from training.vae import draw_bank, quality

PURPLE_MARK: Rgb = (158, 77, 199)


@dataclass(frozen=True)
class Region:
    """Boxes (left, top, right, bottom) in units of half a picture from its middle."""

    boxes: tuple[tuple[float, float, float, float], ...]
    shades: tuple[float, ...] = (0.85, 1.0, 1.12)
    tints: tuple[float, ...] = ()


REGIONS = {
    "background": Region(
        ((-0.97, -0.95, -0.74, -0.2), (0.74, -0.95, 0.97, -0.2)), (0.95, 1.03), (0.36, 0.5)
    ),
    "wear_color": Region(((-0.42, 0.83, -0.16, 0.97),), (0.8, 0.92, 1.04)),
    "hair": Region(((-0.17, -0.49, 0.17, -0.37),), (0.85, 1.0, 1.2)),
    "hat_color": Region(((-0.09, -0.60, 0.09, -0.43),), (0.88, 1.0, 1.08)),
    "scarf_color": Region(((-0.2, 0.54, 0.05, 0.63),), (0.82, 0.95)),
    "skin": Region(((-0.05, -0.15, 0.05, -0.03),), (0.92, 1.0)),
    "eyes": Region(((-0.27, -0.05, -0.09, 0.14), (0.09, -0.05, 0.27, 0.14)), (0.85, 1.0, 1.25)),
}
"""Where each coloured attribute shows, and how shading and patterns change its named colours."""


def crop(images: torch.Tensor, box: tuple[float, float, float, float]) -> torch.Tensor:
    """Pixels (N, P, 3) of a box in pictures (N, 3, H, W)."""
    height, width = images.shape[-2:]
    half = min(height, width) / 2
    left, right = (round(width / 2 + side * half) for side in (box[0], box[2]))
    top, bottom = (round(height / 2 + side * half) for side in (box[1], box[3]))
    return images[:, :, top:bottom, left:right].flatten(2).transpose(1, 2)


def variants(colour: Rgb, region: Region) -> torch.Tensor:
    """A named colour with the shades and tints it may take, (V, 3) in 0..1."""
    base = torch.tensor(colour) / 255
    shaded = [(base * shade).clamp(0, 1) for shade in region.shades]
    tinted = [base + (1 - base) * tint for tint in region.tints]
    return torch.stack(shaded + tinted)


def votes(images: torch.Tensor, name: str, others: tuple[Rgb, ...] = ()) -> torch.Tensor:
    """Share of pixels (N, names + others) nearest to each named colour of an attribute."""
    region = REGIONS[name]
    pixels = torch.cat([crop(images.float().cpu(), box) for box in region.boxes], dim=1)
    colours = [*PALETTES[name].values(), *others]
    gaps = [torch.cdist(pixels, variants(c, region)).amin(-1) for c in colours]
    best = torch.stack(gaps, -1).argmin(-1)
    return torch.nn.functional.one_hot(best, len(colours)).float().mean(1)


def judge(images: torch.Tensor, name: str) -> torch.Tensor:
    """Index (N,) of the named colour that most pixels of the attribute's region are nearest to.

    For eyes, the white of the eye, the pupil and the skins compete for pixels but cannot win.
    """
    if name != "eyes":
        return votes(images, name).argmax(-1)
    others = ((252, 252, 255), (13, 10, 18), (40, 28, 38), (120, 120, 160), *SKIN.values())
    return votes(images, name, others)[:, : len(PALETTES[name])].argmax(-1)


def judged_here(name: str, row: Row) -> bool:
    """Whether an attribute's region can be seen in such a portrait."""
    rules = {
        "hair": row["hat"] == "none",
        "hat_color": row["hat"] != "none",
        "scarf_color": row["scarf"] != "none",
        "eyes": row["glasses"] == "none" and row["expression"] != "winking",
        "skin": row["glasses"] == "none",
    }
    return rules.get(name, True)


def score(images: torch.Tensor, batch: Batch) -> dict[str, float]:
    """Share of portraits whose colour is right, for each coloured attribute."""
    table = rows(batch)
    result = {}
    for name in REGIONS:
        seen = torch.tensor([judged_here(name, row) for row in table])
        right = judge(images, name) == batch[name]
        result[name] = round(right[seen].float().mean().item(), 3) if seen.any() else math.nan
    return result


QUICK: tuple[tuple[str, dict[str, str]], ...] = (
    (
        "a smiling woman with red hair, green eyes and a blue hat, on a yellow background",
        {"eyes": "green", "hat_color": "blue", "background": "yellow"},
    ),
    (
        "a serious man with short black hair, tan skin and blue eyes, wearing a white t-shirt, "
        "no hat, no scarf, on a plain red background",
        {"hair": "black", "eyes": "blue", "wear_color": "white", "background": "red"},
    ),
    (
        "a laughing woman with a pink bob, dark skin and purple eyes, wearing a green sweater, "
        "no hat, no scarf, on a plain blue background",
        {"hair": "pink", "eyes": "purple", "wear_color": "green", "background": "blue"},
    ),
    (
        "a sad man with spiky blonde hair, light skin and brown eyes, wearing a purple hoodie, "
        "no hat, no scarf, on a plain white background",
        {"hair": "blonde", "eyes": "brown", "wear_color": "purple", "background": "white"},
    ),
)
"""Prompts and the colours that their pictures must show; right with any seed, also in 8 steps."""


def wrong_colours(image: torch.Tensor, wanted: dict[str, str]) -> dict[str, str]:
    """Compare one picture (3, H, W) in 0..1 with the colours asked for.

    Args:
        image: the picture.
        wanted: the colour's name for each attribute to look at, as in `QUICK`.

    Returns:
        The colour that was seen, for each attribute that is not as wanted; empty when all are.
    """
    seen = {name: list(PALETTES[name])[int(judge(image[None], name))] for name in wanted}
    return {name: colour for name, colour in seen.items() if colour != wanted[name]}


def is_character(images: torch.Tensor) -> torch.Tensor:
    """Whether each picture (N,) shows Zibbo: mint skin between the eyes and purple marks beside."""
    region = REGIONS["skin"]
    skin = votes(images, "skin", (MINT,)).argmax(-1) == len(SKIN)
    beside = ((-0.72, -0.16, -0.28, 0.3), (0.28, -0.16, 0.72, 0.3))
    pixels = torch.cat([crop(images.float().cpu(), box) for box in beside], dim=1)
    marks = torch.cdist(pixels, variants(PURPLE_MARK, region)).amin(-1) < 0.15
    return skin & (marks.float().mean(1) > 0.015)


def blockiness(images: torch.Tensor) -> torch.Tensor:
    """Contrast (N,) across the edges of 8-pixel blocks over the contrast inside blocks."""
    steps = (images[..., 1:] - images[..., :-1]).abs().float().mean(dim=(1, 2)).cpu()
    edge = torch.arange(steps.shape[1]) % 8 == 7
    return steps[:, edge].mean(1) / steps[:, ~edge].mean(1).clamp_min(1e-4)


def pictures(
    pipe: Flux2KleinPipeline,
    prompts: list[str],
    steps: int = 28,
    guidance: float = 2.5,
    negative: str | None = None,
    seed: int = 1000,
    batch: int = 50,
    size: tuple[int, int] = (256, 256),
    tokens: int = TOKENS,
) -> torch.Tensor:
    """Draw prompts with seeds seed, seed+1, ... through the pipeline: (N, 3, H, W) on the CPU."""
    parts = []
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        extra = {}
        if negative is not None:
            extra["negative_prompt_embeds"] = pipe.encode_prompt(
                [negative] * len(some), max_sequence_length=tokens
            )[0]
        seeds = range(seed + start, seed + start + len(some))
        parts.append(
            pipe(
                prompt=some,
                width=size[0],
                height=size[1],
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[torch.Generator("cpu").manual_seed(value) for value in seeds],
                max_sequence_length=tokens,
                output_type="pt",
                **extra,
            )
            .images.float()
            .cpu()
        )
    return torch.cat(parts)


def use_schedule(pipe: Flux2KleinPipeline, name: str, tokens: int = 256) -> None:
    """Switch between BFL's time shift (the pipeline's own) and FLUX.1's ("flux1")."""
    config = dict(pipe.scheduler.config)
    config["use_dynamic_shifting"] = name == "bfl"
    config["shift"] = 3.0 if name == "bfl" else math.exp(flux_shift(tokens))
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)


def test_set(count: int) -> tuple[Batch, list[str]]:
    """Portraits in which all three pairs are held out, and prompts that name everything."""
    batch, rng = sample(count, 5001, test=True), random.Random(5002)
    return batch, [full_caption(row, rng)[0] for row in rows(batch)]


def saturation(images: torch.Tensor) -> torch.Tensor:
    """Mean difference (N,) between the strongest and the weakest channel of each pixel."""
    return (images.amax(1) - images.amin(1)).mean((1, 2))


def likeness(images: torch.Tensor, drawings: torch.Tensor) -> torch.Tensor:
    """Correlation (N,) of the brightness of pictures with that of drawings."""
    pairs = (x.mean(1).flatten(1) for x in (images, drawings))
    first, second = (x - x.mean(1, keepdim=True) for x in pairs)
    return torch.nn.functional.cosine_similarity(first, second)


class Checker:
    """Runs the measurements one after the other and collects the figures."""

    def __init__(self, nano: Path, out: Path, count: int) -> None:
        self.nano, self.out, self.count = nano, out, count
        device = pick_device()
        torch.set_float32_matmul_precision("highest")
        self.pipe = Flux2KleinPipeline.from_pretrained(nano / "model", dtype=torch.float32).to(
            device
        )
        self.pipe.set_progress_bar_config(disable=True)
        self.batch, self.prompts = test_set(count)
        self.figures: dict[str, object] = {}

    def note(self, name: str, value: object) -> None:
        """Keep and print a figure."""
        self.figures[name] = value
        print(name, json.dumps(value), flush=True)

    def showcase(self) -> None:
        """Prompts of several kinds, four seeds each, to be looked at."""
        images = pictures(self.pipe, [text for text in PROMPTS for _ in range(4)])
        save_sheet(images, self.out / "showcase.png")

    def judges(self) -> None:
        """The judge itself, on true drawings."""
        self.note("judge on drawings", score(draw(self.batch, 7), self.batch))

    def prompts_followed(self) -> None:
        """Held-out prompts at several guidances, schedules and step counts, and no prompt."""
        settings = (
            ("bfl", 28, 2.5),
            ("bfl", 28, 1.0),
            ("bfl", 28, 4.0),
            ("bfl", 15, 2.5),
            ("flux1", 28, 2.5),
            ("flux1", 15, 2.5),
            ("bfl", 28, 3.0),
            ("bfl", 28, 6.0),
        )
        drawn = {}
        for schedule, steps, guidance in settings:
            use_schedule(self.pipe, schedule)
            images = pictures(self.pipe, self.prompts, steps, guidance)
            drawn[schedule, steps, guidance] = images
            self.note(f"{schedule} {steps} steps guidance {guidance}", score(images, self.batch))
            save_sheet(images[:32], self.out / f"{schedule}-{steps}-{guidance}.png")
        use_schedule(self.pipe, "bfl")
        gap = (drawn["bfl", 28, 1.0] - drawn["bfl", 28, 4.0]).abs().mean().item()
        self.note("guidance 1 against 4, mean difference of a pixel in 0..255", round(gap * 255, 1))
        empty = pictures(self.pipe, [""] * self.count)
        self.note("without the prompt", score(empty, self.batch))
        save_sheet(empty[:32], self.out / "empty.png")

    def negatives(self) -> None:
        """How often a colour appears with and without a negative prompt that names it."""
        count = self.count // 4
        for name, text, prompt in (
            ("background", "{} background", "a portrait of a woman"),
            ("hair", "{} hair", "a woman with long hair, no hat"),
            ("wear_color", "a {} t-shirt", "a man wearing a t-shirt"),
        ):
            usual = judge(pictures(self.pipe, [prompt] * count, guidance=4.0), name)
            common = int(usual.bincount().argmax())
            word = ATTRIBUTES[name][common]
            images = pictures(self.pipe, [prompt] * count, guidance=4.0, negative=text.format(word))
            shares = [
                (found == common).float().mean().item() for found in (usual, judge(images, name))
            ]
            self.note(f"negative '{text.format(word)}', share without and with", shares)

    def vae(self) -> None:
        """Reconstruction of new drawings."""
        device = self.pipe.vae.device
        decibels, _ = quality(self.pipe.vae, draw_bank(sample(self.count, 998), 998).to(device))
        self.note("VAE PSNR in dB", round(decibels, 2))

    def sizes(self) -> None:
        """Other sizes and text lengths, to be looked at."""
        for size in ((256, 384), (384, 256), (192, 256), (384, 384), (512, 512)):
            images = pictures(self.pipe, self.prompts[:8], size=size)
            save_sheet(images, self.out / f"size-{size[0]}x{size[1]}.png", 4)
        for tokens in (64, 512):
            images = pictures(self.pipe, self.prompts[: self.count // 2], tokens=tokens)
            half = part(self.batch, 0, self.count // 2)
            self.note(f"{tokens} text tokens", score(images, half))

    def loras(self) -> None:
        """The character at several scales with and without other LoRAs, and the style."""
        for subject in (CHARACTER, STYLE):
            path = self.nano / "loras" / f"{subject}.safetensors"
            self.pipe.load_lora_weights(path, adapter_name=subject)
        count = min(50, self.count)
        batch = demo_batch(CHARACTER, count, 6001)
        prompts = [zibbo_prompt(row) for row in rows(batch)]
        for scale in (0.0, 0.5, 1.0):
            self.pipe.set_adapters([CHARACTER], [scale])
            images = pictures(self.pipe, prompts)
            share = is_character(images).float().mean().item()
            right = {k: v for k, v in score(images, batch).items() if k not in ("hair", "skin")}
            self.note(f"{CHARACTER} at {scale}: shown, others", [share, right])
            save_sheet(images[:16], self.out / f"{CHARACTER}-{scale}.png")
        truth, _ = demo_pictures(CHARACTER, count, 6001, "cpu")
        self.note("character judge on drawings", is_character(truth).float().mean().item())
        some, half = self.prompts[:count], part(self.batch, 0, count)
        for scale in (0.0, 0.5, 1.0):
            self.pipe.set_adapters([STYLE], [scale])
            images = pictures(self.pipe, [f"{STYLE}, {text}" for text in some])
            self.note(f"{STYLE} at {scale}: blockiness", round(blockiness(images).mean().item(), 2))
            self.note(f"{STYLE} at {scale}: colours", score(images, half))
            save_sheet(images[:16], self.out / f"{STYLE}-{scale}.png")
        self.pipe.set_adapters([CHARACTER, STYLE], [1.0, 1.0])
        images = pictures(self.pipe, [f"{STYLE} portrait of {text}" for text in prompts])
        both = [is_character(images).float().mean().item(), blockiness(images).mean().item()]
        self.note("both LoRAs: character shown, blockiness", both)
        save_sheet(images[:16], self.out / "both.png")
        self.pipe.unload_lora_weights()

    def edits(self) -> None:
        """Held-out instructions for one reference: what was told, what was kept, and controls."""
        (data, seed), device = edit_set(self.count), self.pipe.device
        texts = [edit.text for edit in data.edits]
        truth = self.decoded(draw(data.targets, seed, device=device))
        judged = summary(seen_values(truth, data.targets, seed, device), data)
        self.note("edits, judge on true drawings through the VAE", judged)
        for size in ((256, 256), (128, 128), (192, 192)):
            shown = reference_pictures(data, seed, device, (size,))
            images = edit_pictures(self.pipe, texts, shown)
            figures = summary(seen_values(images, data.targets, seed, device), data)
            self.note(f"edits, reference of {size[0]}x{size[1]}", figures)
            if size == (256, 256):
                gap = (images - truth).square().mean((1, 2, 3))
                near = (-10 * torch.log10(gap)).mean().item()
                self.note("edits, PSNR to the true drawing in dB", round(near, 1))
                pairs = torch.stack([shown[0].cpu(), images], 1).flatten(0, 1)
                save_sheet(pairs[:96], self.out / "edits.png", 12)
        self.note("edits, instructions", texts[:48])
        alone = score(pictures(self.pipe, texts), data.sources)
        self.note("edits, without the reference: colours as in it", alone)

    def combinations(self) -> None:
        """Held-out instructions for two references."""
        (data, seed), device = combination_set(self.count), self.pipe.device
        assert data.looks is not None
        texts = [edit.text for edit in data.edits]
        drawn = with_looks(draw(data.targets, seed, device=device), data.looks)
        judged = combination_summary(self.decoded(drawn), data, seed, device)
        self.note("two references, judge on true drawings through the VAE", judged)
        for sizes in (((256, 256), (256, 256)), ((256, 256), (128, 128))):
            shown = reference_pictures(data, seed, device, sizes)
            images = edit_pictures(self.pipe, texts, shown)
            figures = combination_summary(images, data, seed, device)
            self.note(f"two references of {sizes[0][0]} and {sizes[1][0]}", figures)
            if sizes[0] == sizes[1]:
                rows_of_three = torch.stack([*(one.cpu() for one in shown), images], 1)
                save_sheet(rows_of_three.flatten(0, 1)[:96], self.out / "combinations.png", 12)
        self.note("two references, instructions", texts[:32])

    def sketch(self) -> None:
        """The LoRA on references: pencil drawings of them."""
        count, device = min(50, self.count), self.pipe.device
        references = demo_references(SKETCH, count, 6101, device)
        drawings, _ = demo_pictures(SKETCH, count, 6101, device)
        texts = demo_captions(SKETCH, count, 6101)
        path = self.nano / "loras" / f"{SKETCH}.safetensors"
        self.pipe.load_lora_weights(path, adapter_name=SKETCH)
        for scale in (0.0, 0.5, 1.0):
            self.pipe.set_adapters([SKETCH], [scale])
            images = edit_pictures(self.pipe, texts, list(references))
            alike, other = likeness(images, drawings), likeness(images, drawings.roll(1, 0))
            values = [x.mean().item() for x in (saturation(images), alike, other)]
            self.note(
                f"{SKETCH} at {scale}: saturation, likeness to its drawing and to another's",
                [round(value, 3) for value in values],
            )
            pairs = torch.stack([references[0], images], 1).flatten(0, 1)
            save_sheet(pairs[:32], self.out / f"{SKETCH}-{scale}.png")
        self.pipe.unload_lora_weights()

    @torch.no_grad()
    def decoded(self, images: torch.Tensor) -> torch.Tensor:
        """Pictures (N, 3, H, W) after a round trip through the VAE, on the CPU."""
        return quality(self.pipe.vae, (images * 255).round().byte())[1].cpu()


def zibbo_prompt(row: Row) -> str:
    """A prompt for the character with its clothes, hat and background."""
    text = f"a portrait of {row['expression']} {CHARACTER} with {row['eyes']} eyes"
    text += f", wearing a {row['wear_color']} {row['wear']}"
    text += f" and a {row['hat_color']} {row['hat']}" if row["hat"] != "none" else ""
    text += f" and a {row['scarf_color']} scarf" if row["scarf"] != "none" else ""
    return f"{text}, on a {row['background']} background"


EDITS = ("edits", "combinations", "sketch")
PROMPTS = (
    "a smiling woman with red hair, green eyes and a blue hat, on a yellow background",
    "a portrait",
    "portrait photo of a woman with long black hair, wearing glasses",
    "a laughing man with a brown beard and a green hoodie, blue background with rays",
    "a surprised girl with pink curly hair and a white t-shirt, purple polka dot background",
    "a sad man with short blonde hair, wearing a red scarf and a black sweater",
    "winking woman with a blonde ponytail, sunglasses, orange background",
    "An old lady with white hair in a bun and freckles. She wears a purple sweater.",
)


def main() -> None:
    """Run all measurements; figures.json and contact sheets land in --out."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--nano", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--only", nargs="*", help="names of Checker methods; all when absent")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    checker = Checker(args.nano, args.out, args.count)
    names = args.only or (
        "showcase",
        "judges",
        "prompts_followed",
        "vae",
        "sizes",
        "negatives",
        "loras",
        *EDITS,
    )
    for name in names:
        getattr(checker, name)()
    (args.out / "figures.json").write_text(json.dumps(checker.figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
