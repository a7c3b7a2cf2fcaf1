"""The pages say what the code does."""

import importlib.util
import io
import json
import re
import shlex
import subprocess
import tomllib
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs import plots
from klein.core import Delivery, GenerationParams, LoraReport
from klein.entrypoints.cli.main import main
from klein.errors import KleinError
from klein.output.marks import Marks
from klein.output.response import lora_json, model_json, timings_json, to_json
from klein.request.resolve import resolve
from klein.request.schema import parse
from klein.settings import Settings
from tests.support import docs, fakes

PAGES = docs.pages()
SERVICE = "http://localhost:3000"
RUNPOD = re.compile(r"^(http://localhost:8000|https://api\.runpod\.ai/v2/\S+|\$RUNPOD_API)/")

page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


# -- tables ----------------------------------------------------------------------------------------


def test_every_table_has_a_place_and_every_place_a_table() -> None:
    """A table that no page shows is not kept up for anybody."""
    assert {place.name for place in docs.places()} == set(docs.TABLES)


@pytest.mark.parametrize("place", list(docs.places()), ids=lambda p: f"{p.page.stem}-{p.name}")
def test_tables_are_the_codes(place: docs.Place) -> None:
    """`make docs` writes them anew."""
    assert place.text == docs.TABLES[place.name]()


@pytest.mark.parametrize("name", plots.PLOTS)
def test_plots_are_speed_mds(name: str) -> None:
    """Each number of a plot is one of its table; `make docs` draws them anew."""
    assert (plots.FOLDER / name).read_text() == plots.PLOTS[name]()


def _answer() -> dict[str, Any]:
    return to_json(
        fakes.result(_params(width=64, height=64)), Delivery("png", 95, "base64"), Marks()
    )


def _keys(path: str, heading: str) -> set[str]:
    """What stands in backticks in the first column of the first table after a heading."""
    text = (docs.ROOT / path).read_text().split(heading, 1)[1]
    rows = re.search(r"\n\| [^\n]*\n\|[ -|]+\n((?:\|.*\n)+)", text)
    assert rows
    return {
        key for row in rows[1].splitlines() for key in re.findall(r"`(.+?)`", row.split("|")[1])
    }


def test_the_keys_of_an_answer_and_of_a_report_are_all_explained() -> None:
    """And none that is gone."""
    answer = _answer()
    assert _keys("docs/http.md", "The JSON answer:") == set(answer)
    assert _keys("docs/loras.md", "## How to read a report") == {f.name for f in fields(LoraReport)}
    page = (docs.ROOT / "docs/http.md").read_text()
    for name, keys in {
        "images": set(answer["images"][0]) | {"url"},
        "timings": set(timings_json(fakes.result(_params()).timings)),
        "model": set(model_json(fakes.INFO)),
    }.items():
        (row,) = re.findall(rf"^\| `{name}` \| (.+) \|$", page, re.MULTILINE)
        assert set(re.findall(r"`(\w+)`", row)) == keys


def _params(**values: object) -> GenerationParams:
    request = parse({"prompt": "x", "seed": 1} | values)
    return resolve(request, fakes.INFO.spec, lambda: 0).params


# -- what pages name -------------------------------------------------------------------------------


@page
def test_links_lead_somewhere(page: Path) -> None:
    """Files exist, and so do the headings that an anchor names."""
    for path, anchor in docs.links(page):
        target = (page.parent / path) if path else page
        assert target.exists(), f"{page.name}: {path}"
        if anchor:
            assert anchor in docs.anchors(target), f"{page.name}: {path}#{anchor}"


@page
def test_settings_exist(page: Path) -> None:
    """Every KLEIN_… of a page is a setting, or the beginning of some (KLEIN_S3_…)."""
    known = {field.metadata["env"] for field in fields(Settings)}
    for name, more in re.findall(r"\b(KLEIN_[A-Z0-9_]*)(…?)", page.read_text()):
        if name == "KLEIN_":
            continue
        assert name in known or (more and any(x.startswith(name) for x in known)), name


@page
def test_files_modules_and_targets_exist(page: Path) -> None:
    """A path in backticks, a `python -m` of this repository, a `make` target."""
    text = page.read_text()
    for path in re.findall(r"`((?:klein|benchmarks|tests|docs|training)/[\w./-]*)`", text):
        assert (docs.ROOT / path).exists(), path
    for module in re.findall(r"python3? -m ((?:klein|benchmarks|tests|docs|training)[\w.]*)", text):
        assert importlib.util.find_spec(module), module
    targets = set(re.findall(r"^([\w-]+):", (docs.ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^|\$ )make ([a-z-]+)", text, re.MULTILINE)) <= targets


def test_tests_that_pages_name_exist() -> None:
    """A promise is held by a test that is there."""
    for page in PAGES:
        for path, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text()):
            assert f"def {name}(" in (docs.ROOT / path).read_text(), name


def test_the_nouns_of_the_architecture_are_classes() -> None:
    """Every CamelCase name in backticks in its table is defined in klein."""
    text = (docs.ROOT / "docs/architecture.md").read_text()
    table = text.split("## The nouns")[1].split("\n## ")[0]
    source = "\n".join(path.read_text() for path in (docs.ROOT / "klein").rglob("*.py"))
    names = set(re.findall(r"`([A-Z]\w+)`", table))
    assert len(names) >= 10
    for name in names:
        assert re.search(rf"^class {name}\b", source, re.MULTILINE), name


def test_every_image_is_shown() -> None:
    """None is kept that no page needs."""
    shown = {(page.parent / path).resolve() for page in PAGES for path, _ in docs.links(page)}
    assert set(plots.FOLDER.iterdir()) <= shown


# -- code in pages ---------------------------------------------------------------------------------


@page
def test_blocks_parse(page: Path) -> None:
    """bash, JSON, YAML and Python."""
    for block in docs.blocks(page):
        match block.language:
            case "bash":
                subprocess.run(["bash", "-n"], input=block.text.encode(), check=True)
            case "json":
                json.loads(block.text)
            case "yaml":
                list(yaml.safe_load_all(block.text))
            case "python":
                compile(block.text, page.name, "exec")
            case "console":
                lines = "\n".join(docs.shell_lines(block))
                subprocess.run(["bash", "-n"], input=lines.encode(), check=True)
            case "toml":
                tomllib.loads(block.text)
            case language:
                assert language in {"nginx", "text"}, language


@page
def test_json_blocks_are_what_klein_takes_and_gives(page: Path) -> None:
    """A request is accepted; reports and errors have the keys of real ones."""
    for block in docs.blocks(page, "json"):
        data = json.loads(block.text)
        if isinstance(data, list):
            report = lora_json(LoraReport("a", 1.0, applied=True))
            assert all(set(row) == set(report) for row in data)
        elif "error" in data:
            with pytest.raises(KleinError) as raised:
                _params(width=4096, height=4096)
            assert data["error"] == raised.value.as_dict(data["error"]["request_id"])
        else:
            parse(data)


@page
def test_command_lines_are_kleins(page: Path) -> None:
    """Each command exists and has the flags it is called with."""
    for line in docs.shell(page):
        found = re.search(r"python -m klein ([^|]*)", line)
        if not found:
            continue
        words = [word for word in shlex.split(found[1], comments=True) if word != "…"]
        depth = 2 if words[0] == "lora" else 1
        text = _help(*words[:depth])
        for flag in (word for word in words[depth:] if word.startswith("-")):
            assert re.search(rf"{flag}\b", text), f"{page.name}: {flag}"


def _help(*words: str) -> str:
    out = io.StringIO()
    with redirect_stdout(out), pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    assert end.value.code == 0, words
    return out.getvalue()


@page
def test_calls_are_answered(page: Path) -> None:
    """Each curl goes to a route that exists, and what it sends is accepted."""
    routes = [(m, re.sub(r"{\w+}", "[^/]+", path)) for m, path, _ in docs.routes()]
    for line in docs.shell(page):
        for method, url, body in _curls(line):
            data = json.loads(body) if body and not body.startswith("@") else None
            if RUNPOD.match(url):
                assert data is None or parse(data["input"])
                continue
            if not url.startswith((SERVICE, "https://$ENDPOINT_ID.api.runpod.ai")):
                continue
            path = re.sub(r"^\w+://[^/]+", "", url).split("?")[0]
            assert any(m == method and re.fullmatch(p, path) for m, p in routes), url
            if data and path.startswith("/generate"):
                parse(data)


def _curls(line: str) -> list[tuple[str, str, str | None]]:
    """Method, address and body of each curl of a line."""
    calls = []
    for part in re.split(r"(?<!')\|(?!')", line):
        words = shlex.split(part, comments=True)
        if "curl" not in words:
            continue
        words = words[words.index("curl") + 1 :]
        after = {word: words[i + 1] for i, word in enumerate(words[:-1]) if word.startswith("-")}
        body = after.get("-d") or after.get("--data-binary")
        url = next(word for word in words if re.match(r"https?://|\$RUNPOD_API", word))
        calls.append((after.get("-X", "POST" if body else "GET"), url, body))
    return calls


def test_kuberay_gets_the_example() -> None:
    """The manifest deploys what docs/ray-serve.yaml does, one GPU to a worker."""
    example = yaml.safe_load((docs.ROOT / "docs/ray-serve.yaml").read_text())
    (block,) = docs.blocks(docs.ROOT / "docs/deploy-ray.md", "yaml")
    spec = yaml.safe_load(block.text)["spec"]
    assert yaml.safe_load(spec["serveConfigV2"])["applications"] == example["applications"]
    Settings.from_env(example["applications"][0]["runtime_env"]["env_vars"])
    cluster = spec["rayClusterConfig"]
    pin = (docs.ROOT / "requirements-ray.txt").read_text().split("==")[1].split()[0]
    assert cluster["rayVersion"] == pin
    (group,) = cluster["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == 1
    (replica,) = example["applications"][0]["deployments"]
    assert group["maxReplicas"] >= replica["autoscaling_config"]["max_replicas"]


# -- the first screen ------------------------------------------------------------------------------


def test_readme_is_short_and_begins_with_what_a_newcomer_needs() -> None:
    """A picture, the two commands, a LoRA and the proof that it acted."""
    text = (docs.ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 220
    assert "docs/images/" in text[:600]
    for word in ("make serve", "make test"):
        assert word in text[:1800], word
    for word in ('"loras"', "layers_matched"):
        assert word in "\n".join(text.splitlines()[:62]), word


def test_every_page_is_reached_from_readme() -> None:
    """Directly, or through a page that is."""
    seen: set[Path] = set()
    todo = [docs.ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in seen:
            continue
        seen.add(page)
        todo += [
            (page.parent / path).resolve() for path, _ in docs.links(page) if path.endswith(".md")
        ]
    assert set(PAGES) <= seen


def test_images_stay_small() -> None:
    """Everybody who clones klein gets every version of them."""
    large = {path.name: path.stat().st_size for path in (docs.ROOT / "docs/images").iterdir()}
    assert {name: size for name, size in large.items() if size > 250_000} == {}
