"""The benchmarks run, and refuse what cannot be."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import cards, previews, tiers
from klein.inference.pipeline import KleinPipeline
from klein.models.catalog import MODELS
from tests.support import live


@pytest.mark.long
def test_tiers_side_by_side() -> None:
    """Stock and exact on the built-in model, in one table; exact draws stock's picture."""
    argv = ["-m", "benchmarks.tiers", "--rounds", "1", "--steps", "2", "--rank", "0"]
    done = subprocess.run(
        [sys.executable, *argv, "--tiers", "exact"],
        cwd=live.ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.split() for line in done.stdout.splitlines() if "last picture" not in line]
    rows = {line[0]: line for line in lines if line}
    assert rows["stock"][5] == rows["exact"][5] == "4"
    assert float(rows["exact"][-1]) < 0.05


def test_what_previews_cost(tiny_pipe: KleinPipeline) -> None:
    """A row without, with small ones and with partial images, and how many of them came."""
    args = argparse.Namespace(every=[4, 1], partial=3, rounds=2, steps=5, size=(64, 64))
    lines = previews.table(previews.measure(tiny_pipe, tiny_pipe.info.spec, args))
    assert [(line[:20].strip(), line.split()[-1]) for line in lines[1:]] == [
        ("none", "0"),
        ("every 4 steps", "1"),
        ("every 1 steps", "4"),
        ("3 partial images", "3"),
    ]


def test_a_rate_above_the_chips_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the measurement is wrong, and no table is printed."""
    monkeypatch.setattr(tiers, "ceiling", lambda *_: 100.0)
    way = tiers.Way("too fast", lambda *_: (None, 0), seconds=[0.001], forwards=56)
    with pytest.raises(SystemExit, match=r"too fast: .* TFLOP/s, and the chip does 100"):
        list(tiers.table([way], 75.5, "cuda"))


def test_the_work_of_a_forward_is_counted() -> None:
    """As torch's own counter does on the real classes: 75.51 TFLOP at 1024×1024."""
    spec = MODELS["klein-base-9B"]
    for side, expected in ((1024, 75.51), (512, 22.73)):
        work = tiers.teraflops(spec, tiers.Case(side, side, references=0))
        assert work == pytest.approx(expected, rel=0.01)


@pytest.mark.long
def test_cards_from_a_float8_file(tmp_path: Path) -> None:
    """On the CPU with nano's geometry: made, packed, started in a process and drawn with."""
    args = argparse.Namespace(folder=tmp_path, geometry="nano", steps=1)
    cards.prepare(args, "cpu")
    row = cards.spawn(args, cards.Case("float8 file", "fast"), held=0, left=120)
    assert row["decided"] == "fast, none", row
    assert all(row[name] > 0 for name in ("start", "256x256", "turbo"))
