"""Draws SPEED.md's main tables as SVG files: `python -m docs.plots`.

The numbers are read from the tables of SPEED.md, so that a plot cannot say anything else.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path

SPEED = Path(__file__).parents[1] / "SPEED.md"
FOLDER = Path(__file__).parent / "images"
WIDTH, LEFT, TOP, ROW, BAR = 820, 190, 64, 30, 20

STYLE = """<style>
svg{color-scheme:light dark}text{font:14px system-ui,'Segoe UI',sans-serif;fill:#1f2328}
.title{font-weight:600;font-size:16px}.note{fill:#59636e;font-size:12px}.back{fill:#fff}
.grid{stroke:#d1d9e0}.s0{fill:#0969da;stroke:#0969da}.s1{fill:#8250df;stroke:#8250df}
.s2{fill:#1a7f37;stroke:#1a7f37}.s3{fill:#bf8700;stroke:#bf8700}.s4{fill:#cf222e;stroke:#cf222e}
.s5{fill:#59636e;stroke:#59636e}.bar{stroke:none}.line{fill:none;stroke-width:2}
@media(prefers-color-scheme:dark){text{fill:#f0f6fc}.note{fill:#9198a1}.back{fill:#0d1117}
.grid{stroke:#3d444d}.s0{fill:#4493f8;stroke:#4493f8}.s1{fill:#ab7df8;stroke:#ab7df8}
.s2{fill:#3fb950;stroke:#3fb950}.s3{fill:#d29922;stroke:#d29922}.s4{fill:#f85149;stroke:#f85149}
.s5{fill:#9198a1;stroke:#9198a1}.bar{stroke:none}.line{fill:none}}
</style>"""

Point = tuple[float, float]


def table(head: str) -> list[list[str]]:
    """The rows of the table of SPEED.md whose head begins with `head`, without the markup."""
    found = re.search(rf"^{re.escape(head)}.*\n\|[ -|]+\n((?:\|.*\n)+)", SPEED.read_text(), re.M)
    assert found, f"SPEED.md has no table {head!r}"
    lines = re.sub(r"[`*]", "", found[1]).splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def _text(x: float, y: float, text: str, *, style: str = "", anchor: str = "start") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{style}" {place}>{escape(text)}</text>'


def _legend(names: Sequence[str]) -> Iterable[str]:
    x = 16.0
    for number, name in enumerate(names):
        yield f'<circle class="s{number}" cx="{x + 5}" cy="44" r="5"/>'
        yield _text(x + 16, 48, name, style="note")
        x += 34 + 6.4 * len(name)


def _svg(height: float, title: str, parts: Iterable[str]) -> str:
    size = f'width="{WIDTH}" height="{height:.0f}" viewBox="0 0 {WIDTH} {height:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
    back = f'<title>{escape(title)}</title><rect class="back" width="100%" height="100%" rx="8"/>'
    body = [head, STYLE, back, _text(16, 26, title, style="title"), *parts, "</svg>"]
    return "\n".join(body) + "\n"


def bars(title: str, series: Sequence[str], rows: Sequence[tuple[str, list[float], str]]) -> str:
    """A bar a row: its values one after another, a colour for each of `series`, its note behind."""
    scale = (WIDTH - LEFT - 80) / max(sum(values) for _, values, _ in rows)
    parts = list(_legend(series)) if len(series) > 1 else []
    top = TOP if len(series) > 1 else TOP - 20
    for number, (label, values, note) in enumerate(rows):
        y, x = top + number * ROW, float(LEFT)
        parts.append(_text(LEFT - 10, y + 15, label, anchor="end"))
        for style, value in enumerate(values):
            place = f'x="{x:.1f}" y="{y}" width="{value * scale:.1f}" height="{BAR}"'
            parts.append(f'<rect class="s{style} bar" {place}/>')
            x += value * scale
        parts.append(_text(x + 8, y + 15, note, style="note"))
    return _svg(top + len(rows) * ROW + 10, title, parts)


def points(
    title: str,
    axes: tuple[str, str],
    ticks: tuple[Sequence[float], Sequence[float]],
    series: dict[str, list[Point]],
    *,
    log: bool = False,
    joined: bool = False,
    marked: tuple[Point, str] | None = None,
) -> str:
    """Series of points in a frame that the ticks span; `log` is of the vertical axis, and the
    point that is `marked` gets its text."""
    left, top, right, bottom = 60, TOP + 6, WIDTH - 30, 380

    def across(x: float) -> float:
        return left + (x - ticks[0][0]) / (ticks[0][-1] - ticks[0][0]) * (right - left)

    def down(y: float) -> float:
        low, high, at = (math.log(v) if log else v for v in (ticks[1][0], ticks[1][-1], y))
        return bottom - (at - low) / (high - low) * (bottom - top)

    parts = list(_legend(list(series)))
    for x in ticks[0]:
        parts.append(_text(across(x), bottom + 18, f"{x:g}", style="note", anchor="middle"))
    for y in ticks[1]:
        place = f'x1="{left}" x2="{right}" y1="{down(y):.1f}" y2="{down(y):.1f}"'
        parts.append(f'<line class="grid" {place}/>')
        parts.append(_text(left - 8, down(y) + 4, f"{y:g}", style="note", anchor="end"))
    for style, values in enumerate(series.values()):
        at = [(across(x), down(y)) for x, y in values]
        if joined:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
            parts.append(f'<polyline class="s{style} line" points="{path}"/>')
        parts += [f'<circle class="s{style}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>' for x, y in at]
    if marked:
        (x, y), text = marked
        parts.append(_text(across(x) - 12, down(y) + 5, text, anchor="end"))
    parts.append(_text((left + right) / 2, bottom + 38, axes[0], style="note", anchor="middle"))
    parts.append(_text(right, 26, axes[1], style="note", anchor="end"))
    return _svg(bottom + 52, title, parts)


def tiers(side: int) -> str:
    """Seconds an image by tier."""
    rows = [
        (way, [float(seconds)], seconds)
        for way, seconds, *_ in table(f"| {side}×{side} |")
        if "LoRA" not in way
    ]
    return bars(f"Seconds an image, {side}×{side}", ["seconds"], rows)


def forwards() -> str:
    """What computing fewer forwards costs, by family of ways."""
    families: dict[str, list[Point]] = {
        "fewer steps": [],
        "no guidance": [],
        "guidance extrapolated": [],
        "both on a line": [],
        "both held": [],
        "both on a parabola": [],
    }
    for way, count, mean, *_ in table("| way | forwards | mean"):
        family = next((name for name in families if way.startswith(name)), "fewer steps")
        families[family].append((float(count), float(mean)))
    return points(
        "Forwards computed and the difference from all 56",
        ("forwards of the transformer", "mean difference, of 255"),
        ((24, 28, 32, 36, 40, 44, 48, 52), (0.05, 0.1, 0.2, 0.5, 1, 2, 4)),
        families,
        log=True,
        marked=((32, 0.18), "turbo"),
    )


def memory() -> str:
    """GPU memory beside the weights by size."""
    sizes = [side * side / 1024**2 for side in (512, 1024, 1536, 2048)]
    series = {
        row[0]: list(zip(sizes, map(float, row[1:]), strict=True))
        for row in table("| | 512×512 | 1024×1024 |")
    }
    axes = ("megapixels (1024²)", "GB beside the weights")
    ticks = ((0, 1, 2, 3, 4), (0, 2, 4, 6, 8, 10, 12))
    return points("GPU memory of one image", axes, ticks, series, joined=True)


def cold_start() -> str:
    """Where a start's seconds go."""
    rows = [
        (f"{way}, {cache} cache", [float(part) for part in parts[:4]], parts[-1])
        for way, cache, *parts in table("| way | cache |")
    ]
    names = ["imports", "text encoder", "transformer", "VAE"]
    return bars("Seconds until the weights are on the GPU", names, rows)


PLOTS: dict[str, Callable[[], str]] = {
    "tiers-1024.svg": lambda: tiers(1024),
    "tiers-512.svg": lambda: tiers(512),
    "forwards.svg": forwards,
    "memory.svg": memory,
    "cold-start.svg": cold_start,
}
"""By the name of the file."""


if __name__ == "__main__":
    for name, draw in PLOTS.items():
        (FOLDER / name).write_text(draw())
