"""What klein declares, locks and ships is what it imports; workflows do no more than they must."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import klein
from tests import conftest
from tests.bundle.export import ROOT

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
LOCKS = ("requirements.lock", "requirements-dev.lock", "requirements-ray.lock")
WITH_TORCH = {"triton"}
"""Comes with torch's CUDA build, and only with that."""
CUDA = ("nvidia-", "cuda-", "triton")


def _declared() -> dict[str, Requirement]:
    project = PROJECT["project"]
    optional = (line for extra in project["optional-dependencies"].values() for line in extra)
    rows = map(Requirement, (*project["dependencies"], *optional))
    return {canonicalize_name(row.name): row for row in rows}


def _pins(name: str) -> dict[str, str]:
    """Package → version of a requirements file or a lock."""
    found = re.findall(r"^([\w.-]+)==([\w.+]+)", (ROOT / name).read_text(), re.MULTILINE)
    return {canonicalize_name(package): version for package, version in found}


def _imports(path: Path) -> set[str]:
    """The top-level names of other people's packages that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"klein"}


def test_every_imported_package_is_declared() -> None:
    """In [project.dependencies] or an extra; what another package brings does not count. Of a
    namespace that several share, one of them."""
    imported: set[str] = set()
    for path in (ROOT / "service.py", *(ROOT / "klein").rglob("*.py")):
        imported |= _imports(path)
    owners, declared = packages_distributions(), set(_declared())
    packages = {
        name: {canonicalize_name(owner) for owner in owners.get(name, [name])}
        for name in imported - WITH_TORCH
    }
    assert len(packages) > 10
    assert {name for name, of in packages.items() if not of & declared} == set()


def test_what_is_pinned_is_in_the_declared_range() -> None:
    """Every dependency has its pin; Ray's is exact, and the same in the extra."""
    pins = _pins("requirements-dev.lock") | _pins("requirements.txt")
    optional = {"flash-attn", "ray", "prometheus-client"}
    extra = PROJECT["project"]["optional-dependencies"]["ray"]
    assert extra[0] in (ROOT / "requirements-ray.txt").read_text().splitlines()
    assert _pins("requirements-ray.lock")["prometheus-client"] in Requirement(extra[1]).specifier
    for name, row in _declared().items():
        if name not in optional:
            assert pins[name] in row.specifier, name


@pytest.mark.parametrize("name", LOCKS)
def test_locks_are_exact(name: str) -> None:
    """A version and hashes for each package, no hash for torch; no address or path of a machine."""
    text = (ROOT / name).read_text()
    rows = re.sub(r"\\\n\s*", "", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    assert len(rows) > 20
    for row in rows:
        if row != f"torch=={_pins('requirements.txt')['torch']}":
            assert re.fullmatch(r"[\w.-]+==[\w.+]+( ; [^\\]+?)?\s*(--hash=sha256:\w{64}\s*)+", row)
    assert not re.search(r"://|file:|--index|--find-links|(^|\s)/\w", text)


def test_the_locks_follow_the_pins() -> None:
    """`make lock` was not forgotten, and the locks agree where they overlap."""
    locked, *others = (_pins(name) for name in LOCKS)
    assert _pins("requirements.txt").items() <= locked.items()
    assert _pins("requirements-dev.txt").items() <= others[0].items()
    for other in others:
        both = locked.keys() & other.keys()
        assert {name: locked[name] for name in both}.items() <= other.items()


def _needed(name: str) -> set[str]:
    """What a package asks for on this machine, extras aside; CUDA's packages come with torch."""
    rows = [Requirement(line) for line in requires(name) or ()]
    wanted = [row for row in rows if row.marker is None or row.marker.evaluate({"extra": ""})]
    names = {str(canonicalize_name(row.name)) for row in wanted}
    return {each for each in names if not each.startswith(CUDA)}


def test_the_lock_lacks_nothing() -> None:
    """Installed without their dependencies, its packages have all that they need."""
    locked = set(_pins("requirements.lock"))
    seen: set[str] = set()
    queue = {str(canonicalize_name(name)) for name in _pins("requirements.txt")}
    while queue:
        name = queue.pop()
        seen.add(name)
        queue |= _needed(name) - seen
    assert seen - locked == set()


def test_the_lock_knows_what_torch_needs() -> None:
    """pyproject.toml tells it to uv, which cannot see the CPU's build."""
    (row,) = PROJECT["tool"]["uv"]["dependency-metadata"]
    told = {str(canonicalize_name(Requirement(line).name)) for line in row["requires-dist"]}
    assert told == _needed("torch")


def test_there_is_one_version_number() -> None:
    """klein.__version__; the changelog begins with what is not released, then that."""
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "klein.__version__"}
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[:2] == ["Unreleased", klein.__version__]


def test_types_and_license_are_shipped() -> None:
    """An installed klein is typed for those who import it, and carries its license."""
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["klein"]
    assert (ROOT / "klein/py.typed").is_file()
    assert PROJECT["project"]["license-files"] == ["LICENSE"]
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_the_command_returns_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    """What pip makes of [project.scripts] is `sys.exit(main())`."""
    module, _, function = PROJECT["project"]["scripts"]["klein"].partition(":")
    main = getattr(__import__(module, fromlist=[function]), function)
    assert main(["presets"]) == 0
    assert main(["show", "no-such-file"]) == 2
    assert "no-such-file" in capsys.readouterr().err


def test_heavy_folders_are_the_same_everywhere() -> None:
    """The Makefile runs them apart; elsewhere tests/conftest.py hides torch."""
    listed = re.search(r"^HEAVY := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert listed
    assert tuple(listed[1].split()) == conftest.HEAVY
    assert all((ROOT / "tests" / name).is_dir() for name in conftest.HEAVY)


def test_help_names_every_target() -> None:
    """`make help` is the list of what there is."""
    text = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: ((?:.*\\\n)*.*)$", text, re.MULTILINE)
    assert targets
    named = set(re.findall(r'@echo "make ([\w-]+)', text))
    assert set(targets[1].replace("\\", "").split()) - {"help", "coverage", "types"} == named


def test_the_image_takes_one_image_and_checks_every_package() -> None:
    """The base is one variable, for a digest; uv comes with its hashes, those of the lock."""
    text = (ROOT / "Dockerfile").read_text()
    assert re.findall(r"^FROM (\S+)", text, re.MULTILINE) == ["$PYTHON_IMAGE", *["packages"] * 2]
    assert re.findall(r"^ARG PYTHON_IMAGE=(\S+)", text, re.MULTILINE) == ["python:3.11-slim"]
    uv = (ROOT / "docker/uv.lock").read_text()
    assert re.match(r"uv==\S+ \\\n    --hash=sha256:", uv)
    assert uv in (ROOT / "requirements-dev.lock").read_text()
    installs = re.findall(r"\bpip install (.+)", text)
    assert len(installs) == 2
    assert "--require-hashes -r /app/uv.lock" in installs[0]
    assert "-r /app/requirements.lock" in installs[1]


# -- the workflows ---------------------------------------------------------------------------------


def _jobs(path: Path) -> dict[str, dict[str, Any]]:
    jobs: dict[str, dict[str, Any]] = yaml.safe_load(path.read_text())["jobs"]
    return jobs


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_by_commit(path: Path) -> None:
    """With the release that it is in a comment."""
    used = re.findall(r"uses: (\S+)(.*)", path.read_text())
    assert used
    for action, comment in used:
        if not action.startswith("./"):
            assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action), action
            assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment), action


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_may_read_and_no_more(path: Path) -> None:
    """Unless a job says otherwise: one that runs nothing of the project."""
    assert yaml.safe_load(path.read_text())["permissions"] == {"contents": "read"}
    for name, job in _jobs(path).items():
        if "permissions" in job:
            assert name == "push"
            steps = str(job["steps"])
            assert not re.search(r"checkout|make |python|docker (run|build)", steps)
        for step in job.get("steps", ()):
            if "checkout" in step.get("uses", ""):
                assert step["with"]["persist-credentials"] is False


def test_a_release_is_checked_before_it_is_pushed() -> None:
    """push needs image needs check."""
    jobs = _jobs(ROOT / ".github/workflows/release.yml")
    assert jobs["push"]["needs"] == "image"
    assert jobs["image"]["needs"] == "check"
    assert jobs["check"]["uses"] == "./.github/workflows/check.yml"


def test_ci_runs_every_python_that_is_promised() -> None:
    """The classifiers are the matrix."""
    jobs = _jobs(ROOT / ".github/workflows/check.yml")
    promised = re.findall(r"Python :: (3\.\d+)'", str(PROJECT["project"]["classifiers"]))
    assert jobs["test"]["strategy"]["matrix"]["python"] == promised
