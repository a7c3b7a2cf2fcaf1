"""The documentation follows the tables."""

import re
from pathlib import Path

import pytest

from tests import readme

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", readme.tables())
def test_readmes_tables_are_the_codes(name: str) -> None:
    """A preset, format, model, error code, field or setting that is missing or stale fails here.

    `python -m tests.readme` writes the tables anew.
    """
    assert readme.in_readme(name) == readme.tables()[name]


def test_readmes_links_lead_somewhere() -> None:
    """Every relative link and picture of every page exists."""
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "SPEED.md"]:
        if not page.exists():
            continue
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_readme_names_the_two_commands_first() -> None:
    """A newcomer finds them within the first screen."""
    head = (ROOT / "README.md").read_text()[:1800]
    assert "make serve" in head
    assert "make test" in head
