"""Draws the pictures of the pages on the built-in model: `make pictures`."""

import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs/images"
WOMAN = "a smiling woman with red hair, green eyes and a blue hat, on a yellow background"
TIERS = ("exact", "fast", "turbo")

ZIBBO = (
    ("zibbo with a red hat on a blue background", 3),
    ("zibbo wearing a green sweater, smiling, on a yellow background", 3),
)
COLUMNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("no LoRA", ()),
    ("zibbo at 0.5", ("zibbo.safetensors:0.5",)),
    ("zibbo at 1.0", ("zibbo.safetensors:1.0",)),
    ("zibbo + pixelkin", ("zibbo.safetensors:1.0", "pixelkin.safetensors:1.0")),
)

EDITS: dict[str, tuple[tuple[str, str], ...]] = {
    "editing.webp": (
        ("woman.png", "drawn from words"),
        ("sunglasses.png", "an edit of it"),
        ("alien.png", "of that one, with a LoRA"),
        ("hat.png", "repainted through a mask"),
    ),
    "references.webp": (
        ("woman.png", "image 1"),
        ("man.png", "image 2"),
        ("clothes.png", "both"),
        ("pencil.png", "image 1 and a LoRA"),
    ),
}
"""Strips of what the commands of docs/editing.md write: each file and the line above it."""
MASK = (-14, -60, 270, 124)
"""The ellipse around the hat: left, top, right, bottom."""

SIDE, GAP, HEAD, FOOT, RADIUS = 256, 10, 40, 50, 14
LETTERS = 36
"""In a line of a prompt below a picture."""
CARD, TITLE, NOTE = "#161b22", "#f0f6fc", "#7ee2a8"


@dataclass(frozen=True)
class Drawn:
    """An image and the reports of its LoRAs, as they stand in the file."""

    image: Image.Image
    reports: list[dict[str, Any]]


def draw(name: str, *flags: str, speed: str = "auto") -> Path:
    """One picture through the command line."""
    path = FOLDER / name
    argv = [sys.executable, "-m", "klein", "generate", *flags, "-o", str(path)]
    subprocess.run(argv, check=True, env=os.environ | {"KLEIN_SPEED": speed})
    return path


def draw_with(prompt: str, seed: int, loras: tuple[str, ...]) -> Drawn:
    """One picture with LoRAs, and the reports that klein wrote into it."""
    flags = [part for lora in loras for part in ("--lora", lora)]
    path = draw("part.png", prompt, "--seed", str(seed), *flags)
    image = Image.open(path)
    found = re.search(r', klein: ("(?:[^"\\]|\\.)*")$', image.text["parameters"])  # type: ignore[attr-defined]
    assert found
    own = json.loads(json.loads(found[1]))
    drawn = Drawn(image.convert("RGB"), own["lora_reports"])
    path.unlink()
    return drawn


def proof(reports: list[dict[str, Any]]) -> str:
    """What the LoRAs did, a line each."""
    return "\n".join(
        f"{r['layers_matched']}/{r['layers_in_file']} layers, change {r['relative_change']:.3f}"
        for r in reports
    )


def strip(name: str, paths: list[Path]) -> None:
    """The pictures side by side, instead of themselves."""
    pictures = [Image.open(path).convert("RGB") for path in paths]
    whole = Image.new("RGB", (sum(p.width for p in pictures), pictures[0].height))
    left = 0
    for picture in pictures:
        whole.paste(picture, (left, 0))
        left += picture.width
    whole.save(FOLDER / name)
    for path in paths:
        path.unlink()


def card(name: str, columns: list[tuple[str, list[Image.Image], str]]) -> None:
    """A column for each title: its pictures below one another, and a note at its foot."""
    rows = len(columns[0][1])
    size = (len(columns) * (SIDE + GAP) + GAP, HEAD + rows * (SIDE + GAP) + FOOT)
    whole = Image.new("RGBA", size)
    pen = ImageDraw.Draw(whole)
    pen.rounded_rectangle((0, 0, size[0] - 1, size[1] - 1), RADIUS, CARD)
    large, small = ImageFont.load_default(19), ImageFont.load_default(14)
    for number, (title, pictures, note) in enumerate(columns):
        left = GAP + number * (SIDE + GAP)
        middle = left + SIDE / 2
        pen.text((middle, HEAD / 2), title, TITLE, large, anchor="mm")
        for row, picture in enumerate(pictures):
            whole.paste(picture, (left, HEAD + row * (SIDE + GAP)))
        foot = (middle, size[1] - FOOT / 2 - GAP / 4)
        pen.multiline_text(foot, note, NOTE, small, anchor="mm", align="center", spacing=2)
    whole.save(FOLDER / name, quality=90, method=6)


def loras(name: str) -> None:
    """The same prompts with each set of LoRAs, and the proof of what these did."""
    columns = []
    for title, paths in COLUMNS:
        drawn = [draw_with(prompt, seed, paths) for prompt, seed in ZIBBO]
        columns.append((title, [each.image for each in drawn], proof(drawn[0].reports)))
    card(name, columns)


def run_page(page: Path, folder: Path) -> None:
    """Run the `bash` blocks of a page in a folder."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    script = "\n".join(blocks).replace(".venv/bin/python", sys.executable)
    (folder / "docs").symlink_to(ROOT / "docs")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(["/bin/bash", "-euc", script], cwd=folder, check=True, env=env)


def edits(name: str, folder: Path) -> None:
    """A strip of the page's pictures, below each the prompt that is in its file."""
    columns = []
    for file, title in EDITS[name]:
        image = Image.open(folder / file)
        prompt = image.text["parameters"].split("\nNegative prompt")[0]  # type: ignore[attr-defined]
        columns.append((title, [image.convert("RGB")], textwrap.fill(prompt, LETTERS)))
    card(name, columns)


def mask() -> None:
    """The mask that docs/editing.md repaints through."""
    image = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(image).ellipse(MASK, fill=255)
    image.save(FOLDER / "mask.png", optimize=True)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    mask()
    with tempfile.TemporaryDirectory() as folder:
        run_page(ROOT / "docs/editing.md", Path(folder))
        for name in EDITS:
            edits(name, Path(folder))
    loras("loras.webp")
    tiers = [draw(f"{tier}.png", WOMAN, "--seed", "4", speed=tier) for tier in TIERS]
    strip("tiers.png", tiers)


if __name__ == "__main__":
    main()
