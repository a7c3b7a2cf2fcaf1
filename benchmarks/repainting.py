"""How well nano repaints: what the prompt told, the pixels outside the mask, and the mask's edge.

    python -m benchmarks.repainting                   # a Markdown table; minutes
    python -m benchmarks.repainting --each 2 --steps 10 --sheet repainted.png

Held-out drawings and instructions about one thing, a mask around it, drawn through the app's own
loading, resolving and preparing. *Seam* is the mean step between neighbouring pixels across the
mask's edge, divided by that of the other neighbours within six pixels of the edge.
"""

import argparse
import base64
import io
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from klein.app import build
from klein.app.prepare import prepare
from klein.core import GeneratedImage, ImagePipeline, RequestContext
from klein.request.resolve import resolve
from klein.request.schema import parse
from klein.settings import Settings
from klein.sources.fetch import Fetcher
from training.attributes import Batch, sample
from training.draw import draw
from training.edit_check import as_pil, seen_values, told
from training.edits import Edits, make_edits

PARTS = {
    "hat": frozenset({"hat", "hat_color"}),
    "clothes": frozenset({"wear", "wear_color"}),
    "glasses": frozenset({"glasses"}),
    "scarf": frozenset({"scarf", "scarf_color"}),
    "background": frozenset({"background", "pattern"}),
}
"""What is repainted, and the attributes that its instructions change."""

STEPS, EACH = 28, 10
MARGIN = 8
"""Pixels between what changes and the mask's edge: the default feather."""
BAND = 6
"""How far from the mask's edge the picture's own steps are looked at, in pixels."""

Inside = NDArray[np.bool_]
"""(height, width): what a mask repaints."""


@dataclass(frozen=True)
class Repaints:
    """Edits of one part each, their parts, sources as images and masks; `seed` is the drawings'."""

    data: Edits
    parts: tuple[str, ...]
    images: list[Image.Image]
    masks: list[Image.Image]
    seed: int


@dataclass(frozen=True)
class Measured:
    """What came out of a repainted image."""

    part: str
    told: bool
    unchanged: bool
    seam: float


def repaints(each: int, parts: tuple[str, ...] = tuple(PARTS)) -> Repaints:
    """`each` held-out instructions for every part, and the masks that fit them."""
    seed = 7023
    every = make_edits(sample(120 * each, 7021, test=True), 7022, test=True)
    picked: list[tuple[str, int]] = []
    for part in parts:
        fitting = [n for n, edit in enumerate(every.edits) if edit.changed <= PARTS[part]]
        picked += [(part, number) for number in fitting[:each]]
    numbers = [number for _, number in picked]

    def some(batch: Batch) -> Batch:
        return {name: values[numbers] for name, values in batch.items()}

    data = Edits(some(every.sources), some(every.targets), [every.edits[n] for n in numbers])
    before, after = draw(data.sources, seed), draw(data.targets, seed)
    changes = ((after - before).abs().amax(1) > 0.02).numpy()
    names = tuple(part for part, _ in picked)
    masks = [
        spread(change, MARGIN) if part == "background" else ellipse(change)
        for part, change in zip(names, changes, strict=True)
    ]
    return Repaints(data, names, as_pil(before), [Image.fromarray(mask) for mask in masks], seed)


def spread(inside: Inside, pixels: int) -> Inside:
    """`inside` and everything at most `pixels` away, in squares."""
    grown = Image.fromarray(inside).convert("L").filter(ImageFilter.MaxFilter(2 * pixels + 1))
    return np.asarray(grown) > 0


def ellipse(inside: Inside) -> Inside:
    """An ellipse of the proportions of `inside` that has all of it, and a margin."""
    ys, xs = np.nonzero(inside)
    middle = (ys.min() + ys.max()) / 2, (xs.min() + xs.max()) / 2
    half = (np.ptp(ys) + 1) / 2, (np.ptp(xs) + 1) / 2
    reach = np.hypot((ys - middle[0]) / half[0], (xs - middle[1]) / half[1]).max()
    y, x = np.indices(inside.shape)
    radii = [side * reach + MARGIN for side in half]
    distance = np.hypot((y - middle[0]) / radii[0], (x - middle[1]) / radii[1])
    return np.asarray(distance <= 1)


def seam(image: Image.Image, mask: Image.Image) -> float:
    """The mean step across the mask's edge over the mean step beside it, on both sides."""
    inside, values = np.asarray(mask) > 0, np.asarray(image, np.float32)
    near = spread(inside, BAND) & spread(~inside, BAND)
    across, beside = [], []
    for axis in (0, 1):
        steps = np.abs(np.diff(values, axis=axis)).mean(-1)
        edge = np.diff(inside, axis=axis)
        across.append(steps[edge])
        beside.append(steps[np.delete(near, -1, axis) & ~edge])
    return float(np.concatenate(across).mean() / np.concatenate(beside).mean())


def png(image: Image.Image) -> str:
    """An image as a request takes it."""
    out = io.BytesIO()
    image.save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


class Painter:
    """nano as an entrypoint has it."""

    def __init__(self, pipeline: ImagePipeline | None = None) -> None:
        settings = Settings.from_env(os.environ | {"MODEL_ID": "nano"})
        self.pipeline = pipeline or build.loader(settings, os.environ)()
        self.library = build.library(settings)

    def __call__(self, **values: object) -> GeneratedImage:
        """The image that a request asks for."""
        resolved = resolve(parse(values), self.pipeline.info.spec, lambda: 1)
        context = RequestContext(time.monotonic() + 600)
        job = prepare(resolved, context, self.library, Fetcher())
        return self.pipeline.generate(job).images[0]


def measure(
    painter: Painter, cases: Repaints, steps: int
) -> tuple[list[Measured], list[Image.Image]]:
    """Repaint every case, seeds from 0 on, and look at what came out."""
    made = [
        painter(
            prompt=edit.text,
            init_image=png(image),
            mask=png(mask),
            num_inference_steps=steps,
            seed=seed,
        )
        for seed, (edit, image, mask) in enumerate(
            zip(cases.data.edits, cases.images, cases.masks, strict=True)
        )
    ]
    images = [one.image for one in made]
    stack = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    pictures = stack.permute(0, 3, 1, 2).float() / 255
    names = frozenset[str]().union(*(edit.changed for edit in cases.data.edits))
    right = told(seen_values(pictures, cases.data.targets, cases.seed, "cpu", names), cases.data)
    measured = [
        Measured(part, bool(fits), unchanged(one, image, mask), seam(one.image, mask))
        for part, fits, one, image, mask in zip(
            cases.parts, right, made, cases.images, cases.masks, strict=True
        )
    ]
    return measured, images


def unchanged(made: GeneratedImage, image: Image.Image, mask: Image.Image) -> bool:
    """Whether every pixel outside the mask is the caller's, and klein's count says so."""
    outside = np.asarray(mask) == 0
    same = (np.asarray(made.image) == np.asarray(image))[outside].all()
    return bool(same) and (made.unchanged_pixels or 0) >= outside.sum()


def table(measured: list[Measured]) -> Iterator[str]:
    """The lines of a Markdown table: a row a part, and all together."""
    yield "| repainted | images | as told | outside bit-identical | seam, mean | seam, largest |"
    yield "|---" * 6 + "|"
    for part in (*dict.fromkeys(one.part for one in measured), "all"):
        some = [one for one in measured if part in (one.part, "all")]
        right, same = (np.mean([getattr(m, name) for m in some]) for name in ("told", "unchanged"))
        seams = [one.seam for one in some]
        yield (
            f"| {part} | {len(some)} | {right:.2f} | {same:.2f} "
            f"| {np.mean(seams):.2f} | {max(seams):.2f} |"
        )


def save_sheet(cases: Repaints, images: list[Image.Image], path: Path) -> None:
    """Source, mask and result of every case, four cases a row."""
    rows = -(-len(images) // 4)
    sheet = Image.new("RGB", (4 * 3 * 128, rows * 128))
    for number, three in enumerate(zip(cases.images, cases.masks, images, strict=True)):
        for column, one in enumerate(three):
            place = ((number % 4 * 3 + column) * 128, number // 4 * 128)
            sheet.paste(one.convert("RGB").resize((128, 128)), place)
    sheet.save(path)


def main() -> None:
    """Print the table; the pictures too, if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--each", type=int, default=EACH, help="images of every part")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--sheet", type=Path, help="where to write source, mask and result")
    args = parser.parse_args()
    cases = repaints(args.each)
    measured, images = measure(Painter(), cases, args.steps)
    print("\n".join(table(measured)))
    if args.sheet:
        save_sheet(cases, images, args.sheet)


if __name__ == "__main__":
    main()
