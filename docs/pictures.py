"""Draws the pictures of the README: `make pictures`."""

import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).parent / "images"
WOMAN = "a smiling woman with red hair, green eyes and a blue hat, on a yellow background"
TIERS = ("exact", "fast", "turbo")
ZIBBO = "zibbo with a red hat on a blue background"


def draw(name: str, *flags: str, speed: str = "auto") -> Path:
    """One picture through the command line."""
    path = FOLDER / name
    argv = [sys.executable, "-m", "klein", "generate", *flags, "-o", str(path)]
    subprocess.run(argv, check=True, env=os.environ | {"KLEIN_SPEED": speed})
    return path


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


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    draw("woman.png", WOMAN, "--seed", "4")
    without = draw("without.png", ZIBBO, "--seed", "3")
    half = draw("half.png", ZIBBO, "--seed", "3", "--lora", "zibbo.safetensors:0.5")
    full = draw("full.png", ZIBBO, "--seed", "3", "--lora", "zibbo.safetensors:1.0")
    strip("zibbo.png", [without, half, full])
    tiers = [draw(f"{tier}.png", WOMAN, "--seed", "4", speed=tier) for tier in TIERS]
    strip("tiers.png", tiers)


if __name__ == "__main__":
    main()
