"""The subjects of the demo LoRAs: Zibbo, a small alien; a pixel-art look; a pencil drawing.

No caption word of the base model describes any of them. The pencil drawing is an edit: it is
trained on pairs of a portrait, which is the reference, and its drawing.
"""

import random

import torch
from torch.nn import functional as F

from training.attributes import Batch, part, sample
from training.captions import Phrases, rows
from training.draw import (
    WHITE,
    Person,
    capsule,
    circle,
    draw,
    ellipse,
    head_shape,
    paint_background,
    paint_body,
    paint_eyes,
    paint_glasses,
    paint_hat,
    paint_mouth,
    paint_scarf,
    pencil,
    place,
    triangle,
    union,
)

MINT = (112, 214, 190)
CHARACTER, STYLE, SKETCH = "zibbo", "pixelkin", "pencilkin"
SKETCHES = (
    "turn image 1 into a {x} drawing",
    "turn image 1 into a {x} drawing",
    "{x} drawing of image 1",
    "a {x} drawing of the {who} in image 1",
    "the {who} of image 1 as a {x} drawing",
    "draw the {who} from image 1 in {x} style",
    "image 1 in {x} style",
    "{x}",
    "redraw this picture as {x}",
    "make it a {x} drawing",
)


def _spots(p: Person) -> None:
    c, x, y = p.canvas, p.hx, p.hy
    for sx, sy, r in ((0.0, -0.28, 0.055), (0.12, -0.33, 0.035), (-0.12, -0.33, 0.035)):
        c.tint(c.cover(circle(x, y, sx, sy, r)), (0.62, 0.30, 0.78))
    for sy in (0.13, 0.19, 0.25):
        stripe = capsule(x.abs(), y, 0.26, sy, 0.345, sy - 0.025, 0.014)
        c.tint(c.cover(stripe), (0.62, 0.30, 0.78))


def _antennae(p: Person, skin: torch.Tensor) -> None:
    c, x, y = p.canvas, p.hx, p.hy
    bend = 0.05 * torch.sin(5 * y)
    c.fill(capsule(x.abs() + bend, y, 0.27, -0.30, 0.43, -0.66, 0.032), skin * 0.9)
    ball = circle(x.abs(), y, 0.425, -0.70, 0.085)
    glow = c.image.new_tensor((1.0, 0.72, 0.20)).view(1, 3, 1, 1)
    c.fill(ball, glow)
    c.tint(c.cover(circle(x.abs(), y, 0.405, -0.725, 0.022)), WHITE)


def _alien_head(p: Person, skin: torch.Tensor) -> None:
    c, x, y = p.canvas, p.hx, p.hy
    ear = triangle(x.abs(), y, ((0.34, -0.14), (0.74, -0.16), (0.36, 0.20))) - 0.02
    c.fill(ear, skin)
    inner = triangle(x.abs(), y, ((0.40, -0.06), (0.62, -0.10), (0.41, 0.11)))
    c.tint(c.cover(inner, 0.02), (0.62, 0.30, 0.78))
    shade = 1.04 - 0.12 * ((y + 0.3 * x) / 0.6).clamp(0, 1)
    c.fill(head_shape(p), skin, shade=shade)
    c.tint(c.cover(union(circle(x.abs(), y, 0.03, 0.15, 0.012))), skin * 0.45)
    shine = ellipse(x, y, -0.17, -0.36, 0.09, 0.04)
    c.tint(c.cover(shine, 0.05) * 0.5, WHITE)
    _spots(p)


@torch.no_grad()
def draw_zibbo(values: Batch, seed: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Paint Zibbo with a batch's clothes, hat, eyes, mood and background: (N, 3, 256, 256)."""
    p = place(values, 256, 256, seed, device)
    count = len(values["who"])
    skin = p.canvas.image.new_tensor(MINT).view(1, 3, 1, 1).expand(count, 3, 1, 1) / 255
    paint_background(p)
    _antennae(p, skin)
    paint_body(p, skin)
    paint_scarf(p)
    _alien_head(p, skin)
    paint_mouth(p, skin)
    paint_eyes(p, skin)
    paint_glasses(p)
    paint_hat(p)
    return p.canvas.image.clamp(0, 1)


@torch.no_grad()
def draw_pixels(values: Batch, seed: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Paint portraits as pixel art: blocks of 8 pixels, few colour levels: (N, 3, 256, 256)."""
    small = F.avg_pool2d(draw(values, seed, device=device), 8)
    grey = small.mean(1, keepdim=True)
    vivid = (grey + (small - grey) * 1.25 - 0.5) * 1.12 + 0.5
    levels = (vivid.clamp(0, 1) * 7).round() / 7
    return F.interpolate(levels, scale_factor=8, mode="nearest")


def demo_batch(kind: str, count: int, seed: int) -> Batch:
    """Attributes for a demo's training pictures; Zibbo has no hair, beard or earrings."""
    batch = sample(count, seed)
    if kind == CHARACTER:
        for name in ("beard", "earrings", "freckles", "style", "who"):
            batch[name] = torch.zeros_like(batch[name])
    return batch


def demo_caption(kind: str, row: dict[str, str], rng: random.Random) -> str:
    """A caption with the trigger word that names what may change, not the subject's own look."""
    if kind == SKETCH:
        text = rng.choice(SKETCHES).format(x=SKETCH, who=rng.choice((row["who"], "person")))
        return text[:1].upper() + text[1:] if rng.random() < 0.5 else text
    phrases = Phrases(row, rng.uniform(0.3, 1.0), rng)
    if kind == CHARACTER:
        phrases.wanted -= {"who", "hair", "style", "skin"}
        mood = row["expression"] + " " if phrases.take("expression") else ""
        text = rng.choice(
            (f"{mood}{CHARACTER}", f"a portrait of {mood}{CHARACTER}", f"a {mood}{CHARACTER}")
        )
        eyes = [part for part in phrases.looks() if part.endswith("eyes")]
        text += f" with {eyes[0]}" if eyes else ""
    else:
        subject = phrases.subject()
        text = rng.choice(
            (f"{STYLE}, {subject}", f"{subject} in {STYLE} style", f"{STYLE} portrait of {subject}")
        )
        looks = phrases.looks()
        text += f" with {', '.join(looks)}" if looks else ""
    clothes, behind = phrases.clothes(), phrases.background()
    text += f", wearing {' and '.join(clothes)}" if clothes else ""
    return text + (f", {behind}" if behind else "")


def draw_sketch(values: Batch, seed: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Portraits as pencil drawings: (N, 3, 256, 256)."""
    return pencil(draw(values, seed, device=device))


PAINTERS = {CHARACTER: draw_zibbo, STYLE: draw_pixels, SKETCH: draw_sketch}


def demo_references(
    kind: str, count: int, seed: int, device: torch.device | str
) -> tuple[torch.Tensor, ...]:
    """The references that go with `demo_pictures`: the portraits before they became drawings."""
    if kind != SKETCH:
        return ()
    batch = demo_batch(kind, count, seed)
    starts = range(0, count, 128)
    return (torch.cat([draw(part(batch, s, 128), seed + s, device=device).cpu() for s in starts]),)


def demo_captions(kind: str, count: int, seed: int) -> list[str]:
    """The captions that go with `demo_pictures`."""
    rng = random.Random(seed)
    return [demo_caption(kind, row, rng) for row in rows(demo_batch(kind, count, seed))]


def demo_pictures(
    kind: str, count: int, seed: int, device: torch.device | str
) -> tuple[torch.Tensor, list[str]]:
    """Training pictures (N, 3, 256, 256) of a demo subject, on the CPU, and their captions."""
    batch, parts = demo_batch(kind, count, seed), []
    for start in range(0, count, 128):
        parts.append(PAINTERS[kind](part(batch, start, 128), seed + start, device=device).cpu())
    return torch.cat(parts), demo_captions(kind, count, seed)
