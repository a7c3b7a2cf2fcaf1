"""Rules of the house that no linter knows."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [ROOT / "service.py", *sorted((ROOT / "klein").rglob("*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_are_short(path: Path) -> None:
    """60 lines at most."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, f"{path.name}:{node.name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_house_does_not_know_its_service(path: Path) -> None:
    """service.py is a door; nothing inside imports it."""
    if path.name != "service.py":
        assert "import service" not in path.read_text()


def test_every_module_says_what_it_is() -> None:
    """In a docstring, on its first line."""
    for path in SOURCES:
        assert ast.get_docstring(ast.parse(path.read_text())), path


CPU = """
import resource, sys
sys.argv[1:] = {argv!r}
import klein.__main__
try:
    klein.__main__.main()
except SystemExit:
    used = resource.getrusage(resource.RUSAGE_SELF)
    print("CPU", used.ru_utime + used.ru_stime)
"""


@pytest.mark.parametrize("argv", [["--help"], ["generate", "--help"]])
def test_help_is_quick(argv: list[str]) -> None:
    """Under half a second of CPU, also with all flags of a request; the best of three, since a core
    that others share is slower."""
    script = CPU.format(argv=argv)
    seconds = []
    for _ in range(3):
        run = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
        )
        seconds.append(float(run.stdout.split("CPU")[1]))
        if seconds[-1] < 0.5:
            return
    raise AssertionError(seconds)


def test_light_modules_stay_light() -> None:
    """Reading requests, tables and LoRA headers needs neither torch nor a web framework."""
    script = (
        "import sys, klein.request.resolve, klein.models.plan;"
        "import klein.output.response, klein.lora.library;"
        "heavy = {'torch', 'diffusers', 'transformers', 'bentoml', 'runpod', 'starlette', 'boto3'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert run.stdout.strip() == "[]"
