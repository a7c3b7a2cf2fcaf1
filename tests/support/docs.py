"""The pages and what in them is made from the code: `python -m tests.support.docs --write`.

A place for a table is a pair of comments around it, `<!-- name -->` and `<!-- /name -->`, in any
page. The name is one of TABLES.
"""

import argparse
import ast
import inspect
import re
import shlex
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.cards import CARDS
from docs.plots import table as speed_table
from klein import errors
from klein.app.metrics import METRICS
from klein.entrypoints.cli.exit_codes import exit_code
from klein.entrypoints.http.app import create_app
from klein.entrypoints.http.errors import http_status
from klein.entrypoints.http.openai import schema as openai
from klein.errors import KleinError
from klein.models import speed
from klein.models.catalog import GB, MODELS
from klein.models.machine import Device, Machine
from klein.models.plan import place
from klein.models.samplers import SAMPLERS
from klein.models.schedule import SCHEDULES
from klein.request.formats import FORMATS, RETURN_TYPES
from klein.request.presets import DEFAULT_PRESET, PRESETS
from klein.request.schema import GenerateRequest, LoraRequest
from klein.settings import Settings

ROOT = Path(__file__).parents[2]

RUN_AS_PRINTED = tuple(
    ROOT / name
    for name in (
        "README.md",
        "docs/requests.md",
        "docs/loras.md",
        "docs/editing.md",
        "docs/speed.md",
        "docs/http.md",
    )
)
"""Pages whose `bash` and `python` blocks run as printed against nano on port 3000. What needs a
GPU, a token or a network is in `console` blocks, each command after a `$`."""

UNDESCRIBED = (
    ("GET", "/docs", "the OpenAPI description, to read and to try in a browser"),
    ("GET", "/openapi.json", "the OpenAPI description"),
    ("GET", "/livez", "200 as soon as the process answers, also while an image is drawn"),
    ("GET", "/readyz", "200 once the model is loaded, 503 before"),
    ("GET", "/metrics", "[metrics](#metrics) for Prometheus"),
)
"""Routes that the OpenAPI description leaves out, BentoML's own among them."""


def pages() -> list[Path]:
    """Every page that is held to the code."""
    top = [ROOT / name for name in ("README.md", "SPEED.md", "CHANGELOG.md")]
    return top + sorted((ROOT / "docs").glob("*.md"))


# -- tables ----------------------------------------------------------------------------------------


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(head)]
    lines += [["---"] * len(lines[0]), *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _models() -> str:
    rows = []
    for row in MODELS.values():
        weights = f"{row.resident_bytes / GB:.1f} GB" if row.needs_gpu else "14 MB"
        own = f"{row.num_inference_steps} · {row.guidance_scale or 0:g}, distilled"
        rows.append(
            (
                f"`{row.name}`",
                row.repo or "built in",
                weights,
                own if row.distilled else "the preset's",
                row.license + (", gated" if row.gated else ""),
            )
        )
    return _table(("`MODEL_ID`", "repository", "weights", "steps · guidance", "license"), rows)


def _presets() -> str:
    return _table(
        ("preset", "steps", "guidance", "size", "sampler", "schedule", "for"),
        (
            (
                f"`{p.name}`" + (" (default)" if p.name == DEFAULT_PRESET else ""),
                p.num_inference_steps,
                f"{p.guidance_scale:g}",
                f"{p.width}×{p.height}",
                f"`{p.sampler}`",
                f"`{p.schedule}`",
                p.purpose,
            )
            for p in PRESETS.values()
        ),
    )


def _kind(schema: dict[str, Any]) -> str:
    options = schema.get("anyOf") or [schema]
    names = [_one(option) for option in options if option.get("type") != "null"]
    return " or ".join(dict.fromkeys(names))


def _one(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return _kind(schema)
    if "enum" in schema:
        return "name"
    kind = str(schema.get("type", "object"))
    if "minimum" in schema and "maximum" in schema:
        return f"{kind} {schema['minimum']:g}–{schema['maximum']}"
    return kind


def _fields_of(model: type[GenerateRequest] | type[LoraRequest]) -> str:
    properties = model.model_json_schema()["properties"]
    rows = []
    for name, field in model.model_fields.items():
        kind = _kind(properties[name])
        if name == "loras":
            kind = f"list of `{{{', '.join(LoraRequest.model_fields)}}}`"
        default = "" if field.default is None else f"`{field.default}`"
        default = "required" if field.is_required() else default
        rows.append((f"`{name}`", kind, default, field.description))
    return _table(("field", "type", "default", "what it does"), rows)


def _formats() -> str:
    return _table(
        ("format", "type", "`output_quality`", "note"),
        (
            (f"`{f.name}`", f.mime_type, "acts" if f.quality else "ignored", f.note)
            for f in FORMATS.values()
        ),
    )


def _named(title: str, rows: Iterable[tuple[str, str]]) -> str:
    return _table((f"`{title}`", "what it is"), ((f"`{name}`", doc) for name, doc in rows))


PLACED = {"none": "resident", "model": "takes turns", "sequential": "layer by layer"}


def _cards() -> str:
    """Where base-9B goes on a card of the Ada generation or newer, by itself."""

    def placed(free: float, float8: bool) -> str:
        card = Device("cuda", "", int(free * GB), int(free * GB), (8, 9))
        machine = Machine((card,), 64 * GB, 0)
        spec, settings = MODELS["klein-base-9B"], Settings()
        offload, why = place(settings, machine, spec, "cuda", float8=float8)
        situation = speed.situation(offload, float8=float8)
        made = speed.choose("auto", "cuda", (8, 9), situation, float8=float8)
        needed = why.split(": ")[1].split(" needed")[0]
        return f"`{made.tier.name}`, {PLACED[offload]}: {needed}"

    return _table(
        ("card", "from the bfloat16 folder", "with a float8 file"),
        ((f"{size} GB", placed(free, False), placed(free, True)) for size, free in CARDS.items()),
    )


def _schedules() -> str:
    named = _named("schedule", ((name, doc) for name, (_, doc) in SCHEDULES.items()))
    return f"{named}\n| a number | mu itself |\n| a list of numbers | the noise levels themselves |"


def _measured(side: int) -> dict[str, str]:
    """Seconds by tier, of SPEED.md's first tables; eager is stock diffusers."""
    rows = speed_table(f"| {side}×{side} |")
    return {row[0]: row[1] for row in rows} | {"eager": rows[0][1]}


GPUS = {(8, 0): "Ampere", (8, 9): "Ada", (9, 0): "Hopper", (10, 0): "Blackwell"}


def _needs(tier: speed.Tier) -> str:
    options = [speed.OPTIONS[name] for name in tier.options if not speed.OPTIONS[name].optional]
    if not options:
        return "nothing"
    least = max(option.capability for option in options)
    needed = [f"{GPUS[least]} or newer"] if least in GPUS else []
    excluded = {name for option in options for name in option.excludes}
    texts = {"model": "`model` or", "sequential": "`sequential` offload"}
    not_with = " ".join(text for name, text in texts.items() if name in excluded)
    needed += ["a base model"] if "distilled" in excluded else []
    return ", ".join(needed) + (f"; not with {not_with}" if not_with else "")


def _seconds(tier: str, large: dict[str, str], small: dict[str, str]) -> tuple[str, str, str]:
    if tier not in large:
        return ("not measured",) * 3
    faster = float(large["eager"]) / float(large[tier])
    return f"{large[tier]} s", f"{small[tier]} s", f"{faster:.1f}"


def _tiers(every: bool = True) -> str:
    """Of all tiers, or of those only that were measured."""
    large, small = _measured(1024), _measured(512)
    return _table(
        ("tier", "images", "1024×1024", "512×512", "× stock", "needs"),
        (
            (
                f"`{tier.name}`",
                tier.doc,
                *_seconds(tier.name, large, small),
                _needs(tier),
            )
            for tier in speed.TIERS.values()
            if every or tier.name in large
        ),
    )


def _options() -> str:
    rows = []
    for option in speed.OPTIONS.values():
        inside = ", ".join(f"`{t.name}`" for t in speed.TIERS.values() if option.name in t.options)
        rows.append((f"`{option.name}`", inside, "no" if option.exact else "yes", option.doc))
    return _table(("option", "in", "changes images", "what it does"), rows)


def _settings() -> str:
    rows = []
    for row in fields(Settings):
        text = _default(row.default)
        rows.append((f"`{row.metadata['env']}`", f"`{text}`" if text else "", row.metadata["doc"]))
    return _table(("variable", "default", "what it does"), rows)


def _default(value: object) -> str:
    """A setting's default as one would write it into the environment."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if value or value == 0 else ""


def _openai_fields() -> str:
    rows = [(f"`{row.name}`", row.doc) for row in openai.ALIASES]
    rows += [
        (f"`{name}`", f"no effect, with a warning: {why}") for name, why in openai.IGNORED.items()
    ]
    rows += [(f"`{name}`", f"refused: {why}") for name, why in openai.REFUSED.items()]
    return _table(("OpenAI's field", "in klein"), rows)


def _openai_qualities() -> str:
    rows = []
    for name, preset in openai.QUALITIES.items():
        capped = ", with a warning" if name in openai.CAPPED else ""
        rows.append((f"`{name}`", f"`{preset or DEFAULT_PRESET}`{capped}"))
    return _table(("`quality`", "`preset`"), rows)


def _errors() -> str:
    classes = [
        c
        for _, c in inspect.getmembers(errors, inspect.isclass)
        if issubclass(c, KleinError) and c is not KleinError
    ]
    meaning = dict(re.findall(r"[├└│ ─]+(\w+) +(.+)", errors.__doc__ or ""))
    return _table(
        ("code", "HTTP", "exit", "retryable", "meaning"),
        (
            (
                f"`{c.code}`",
                http_status(c.code),
                exit_code(c.code),
                "yes" if c.retryable else "no",
                meaning[c.__name__],
            )
            for c in sorted(classes, key=lambda c: http_status(c.code))
        ),
    )


def routes() -> list[tuple[str, str, str]]:
    """Method, path and first sentence of every route on the service's port."""
    found = []
    for path, methods in create_app().openapi()["paths"].items():
        for method, row in methods.items():
            found.append((method.upper(), path, _sentence(row["description"])))
    return [*found, *UNDESCRIBED]


def _routes() -> str:
    rows = ((method, f"`{path}`", doc) for method, path, doc in routes())
    return _table(("method", "path", "what it answers"), rows)


def _metrics() -> str:
    rows = (
        (
            f"`{row.name}`" + (f" by {', '.join(row.labels)}" if row.labels else ""),
            row.kind.lower(),
            row.doc,
        )
        for row in METRICS
    )
    return _table(("metric", "kind", "what it counts"), rows)


def _sentence(doc: str | None) -> str:
    """The first sentence of a docstring, on one line and without its dot."""
    text = " ".join((doc or "").strip().split("\n\n")[0].split())
    return re.split(r"(?<=[^.])\. (?=[A-Z])", text)[0].rstrip(".")


def _doc(path: Path) -> str:
    return _sentence(ast.get_docstring(ast.parse(path.read_text())))


def _tree() -> str:
    """klein's folders, high to low, each with its modules."""
    rows = [("`klein/`", _doc(ROOT / "klein/__init__.py"), _modules(ROOT / "klein"))]
    for layer in layers():
        for name in layer:
            top = ROOT / "klein" / name
            if top.is_dir():
                inner = sorted(path.parent for path in top.rglob("__init__.py"))
                rows += [
                    (f"`{p.relative_to(ROOT)}/`", _doc(p / "__init__.py"), _modules(p))
                    for p in inner
                ]
    return _table(("folder", "what it is", "modules"), rows)


def _modules(folder: Path) -> str:
    names = sorted(path.stem for path in folder.glob("*.py"))
    return " ".join(f"`{name}`" for name in names if name != "__init__")


def layers() -> list[list[str]]:
    """The import contract's layers, high to low."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = (row for row in tool["contracts"] if row["type"] == "layers" and row["layers"])
    return [re.split(r" *[|:] *", layer) for layer in contract["layers"]]


def _layers() -> str:
    lines = [" · ".join(layer) for layer in layers()]
    return "```text\n" + "\n".join(lines) + "\n```"


TABLES: dict[str, Callable[[], str]] = {
    "models": _models,
    "presets": _presets,
    "fields": lambda: _fields_of(GenerateRequest),
    "lora-fields": lambda: _fields_of(LoraRequest),
    "formats": _formats,
    "return-types": lambda: _named("return_type", RETURN_TYPES.items()),
    "schedules": _schedules,
    "samplers": lambda: _named("sampler", ((row.name, row.doc) for row in SAMPLERS.values())),
    "tiers": _tiers,
    "measured-tiers": lambda: _tiers(every=False),
    "cards": _cards,
    "options": _options,
    "settings": _settings,
    "errors": _errors,
    "openai-fields": _openai_fields,
    "openai-qualities": _openai_qualities,
    "routes": _routes,
    "metrics": _metrics,
    "tree": _tree,
    "layers": _layers,
}
"""What the code knows, by the name of its place."""

_PLACE = re.compile(r"<!-- (?P<name>[a-z-]+) -->\n(?P<text>.*?)<!-- /(?P=name) -->", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Place:
    """A place for a table in a page, and what stands there now."""

    page: Path
    name: str
    text: str


def places() -> Iterator[Place]:
    """Every place of every page."""
    for page in pages():
        for found in _PLACE.finditer(page.read_text()):
            yield Place(page, found["name"], found["text"].strip())


def write() -> None:
    """Write every table anew."""
    for page in pages():
        text = page.read_text()
        page.write_text(
            _PLACE.sub(
                lambda f: f"<!-- {f['name']} -->\n{TABLES[f['name']]()}\n<!-- /{f['name']} -->",
                text,
            )
        )


# -- code in pages ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of code."""

    page: Path
    language: str
    text: str


def blocks(page: Path, *languages: str) -> list[Block]:
    """The page's fenced blocks, of these languages if any are named."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [Block(page, name, text) for name, text in found if not languages or name in languages]


def shell_lines(block: Block) -> list[str]:
    """The block's commands, each in one string: of `bash` all of them, of `console` what follows
    a `$`. A command goes on while a quotation is open or a line ends in a backslash."""
    commands: list[str] = []
    going_on = False
    for line in block.text.splitlines():
        if going_on:
            commands[-1] += f"\n{line}"
        elif block.language == "bash" or line.startswith("$ "):
            commands.append(line.removeprefix("$ "))
        else:
            continue
        going_on = _goes_on(commands[-1])
    return [command.replace("\\\n", " ") for command in commands]


def _goes_on(command: str) -> bool:
    try:
        shlex.split(command, comments=True)
    except ValueError:
        return True
    return command.endswith("\\")


def shell(page: Path) -> list[str]:
    """Every command of the page."""
    return [line for block in blocks(page, "bash", "console") for line in shell_lines(block)]


def runnable(language: str, pages: tuple[Path, ...] = RUN_AS_PRINTED) -> list[str]:
    """The blocks of that language that run as printed."""
    return [block.text for page in pages for block in blocks(page, language)]


def anchors(page: Path) -> set[str]:
    """The ids that GitHub gives the page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    ids: set[str] = set()
    for heading in re.findall(r"^#+ +(.*)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^]]*)]\([^)]*\)", r"\1", heading).lower()
        ids.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return ids


def links(page: Path) -> list[tuple[str, str]]:
    """Path and anchor of every link of the page that stays inside the repository."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\((?!\w+:)([^)\s]+)\)", text)
    targets += re.findall(r"(?:src|href)=\"(?!\w+:)([^\"]+)\"", text)
    return [(path, anchor) for path, _, anchor in (target.partition("#") for target in targets)]


def main() -> None:
    parser = argparse.ArgumentParser(description="The tables of the pages, made from the code.")
    parser.add_argument("--write", action="store_true", help="write them anew")
    if parser.parse_args().write:
        write()
    else:
        for name, make in TABLES.items():
            print(f"{name}\n\n{make()}\n")


if __name__ == "__main__":
    main()
