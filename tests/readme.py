"""README's tables, made from klein's own. `python -m tests.readme` writes them anew."""

import inspect
import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

from klein import errors
from klein.__main__ import exit_code
from klein.errors import KleinError
from klein.models.catalog import GB, MODELS
from klein.models.schedule import SCHEDULES
from klein.request.formats import FORMATS
from klein.request.presets import DEFAULT_PRESET, PRESETS
from klein.request.schema import GenerateRequest, LoraRequest
from klein.settings import Settings

README = Path(__file__).parents[1] / "README.md"


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(head)]
    lines += [["---"] * len(lines[0]), *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _models() -> str:
    return _table(
        ("`MODEL_ID`", "repository", "weights", "steps · guidance", "licence"),
        (
            (
                f"`{row.name}`",
                row.repo or "built in",
                f"{row.resident_bytes / GB:.1f} GB" if row.needs_gpu else "14 MB",
                f"{row.num_inference_steps} · {row.guidance_scale:g}, distilled"
                if row.distilled
                else "the preset's",
                row.licence + (", gated" if row.gated else ""),
            )
            for row in MODELS.values()
        ),
    )


def _presets() -> str:
    return _table(
        ("preset", "steps", "guidance", "size", "schedule", "for"),
        (
            (
                f"`{p.name}`" + (" (default)" if p.name == DEFAULT_PRESET else ""),
                p.num_inference_steps,
                f"{p.guidance_scale:g}",
                f"{p.width}×{p.height}",
                f"`{p.schedule}`",
                p.purpose,
            )
            for p in PRESETS.values()
        ),
    )


def _kind(schema: dict[str, object]) -> str:
    options = schema.get("anyOf") or [schema]
    assert isinstance(options, list)
    names = [_one(option) for option in options if option.get("type") != "null"]
    return " or ".join(dict.fromkeys(names))


def _one(schema: dict[str, object]) -> str:
    if "enum" in schema:
        return "name"
    kind = str(schema.get("type", "object"))
    if "minimum" in schema and "maximum" in schema:
        return f"{kind} {schema['minimum']}–{schema['maximum']}"
    return kind


def _fields() -> str:
    properties = GenerateRequest.model_json_schema()["properties"]
    rows = []
    for name, field in GenerateRequest.model_fields.items():
        default = "required" if field.is_required() else field.default
        shown = "" if default is None else f"`{default}`" if default != "required" else "required"
        kind = (
            f"list of `{{{', '.join(LoraRequest.model_fields)}}}`"
            if name == "loras"
            else _kind(properties[name])
        )
        rows.append((f"`{name}`", kind, shown, field.description))
    return _table(("field", "type", "default", "what it does"), rows)


def _formats() -> str:
    return _table(
        ("format", "type", "`output_quality`", "note"),
        (
            (f"`{f.name}`", f.mime_type, "acts" if f.quality else "ignored", f.note)
            for f in FORMATS.values()
        ),
    )


def _schedules() -> str:
    return _table(
        ("`schedule`", "what it is"),
        [*((f"`{name}`", doc) for name, (_, doc) in SCHEDULES.items()), ("a number", "mu itself")],
    )


def _settings() -> str:
    rows = []
    for row in fields(Settings):
        default = {True: "on", False: "off", None: ""}.get(row.default, row.default)  # type: ignore[call-overload]
        shown = (
            f"`{default:g}`" if isinstance(default, float) else f"`{default}`" if default else ""
        )
        rows.append((f"`{row.metadata['env']}`", shown, row.metadata["doc"]))
    return _table(("variable", "default", "what it does"), rows)


def _errors() -> str:
    from klein.entrypoints.http.app import http_status

    classes = [
        c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, KleinError)
    ]
    meaning = dict(re.findall(r"[├└│ ─]+(\w+) {2,}(.+)", errors.__doc__ or ""))
    return _table(
        ("code", "HTTP", "exit", "try again", "meaning"),
        (
            (
                f"`{c.code}`",
                http_status(c.code),
                exit_code(c.code),
                "yes" if c.retryable else "no",
                meaning[c.__name__],
            )
            for c in sorted(
                (c for c in classes if c is not KleinError), key=lambda c: http_status(c.code)
            )
        ),
    )


def tables() -> dict[str, str]:
    """Every generated table by the name of its place."""
    return {
        "models": _models(),
        "presets": _presets(),
        "fields": _fields(),
        "formats": _formats(),
        "schedules": _schedules(),
        "settings": _settings(),
        "errors": _errors(),
    }


def in_readme(name: str) -> str:
    """What README has in that place."""
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", README.read_text(), re.DOTALL)
    assert found, f"README has no place for {name}"
    return found[1].strip()


def write() -> None:
    text = README.read_text()
    for name, table in tables().items():
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = place.sub(lambda hit, table=table: f"{hit[1]}{table}\n{hit[2]}", text)
    README.write_text(text)


if __name__ == "__main__":
    write()
