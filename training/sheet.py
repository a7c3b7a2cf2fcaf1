"""Contact sheets: many pictures in one PNG."""

from pathlib import Path

import torch
from PIL import Image


def save_sheet(images: torch.Tensor, path: Path, columns: int = 8) -> None:
    """Save images (N, 3, H, W) in 0..1 as one grid with thin white gaps."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    sheet = torch.ones(3, rows * (height + 4), columns * (width + 4))
    for index, image in enumerate(images.cpu()):
        top, left = (index // columns) * (height + 4), (index % columns) * (width + 4)
        sheet[:, top : top + height, left : left + width] = image
    array = (sheet.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
