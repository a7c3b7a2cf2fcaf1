from pathlib import Path

from klein.app.prepare import settle_loras
from klein.errors import LoraError
from klein.lora.file import Identity, LoraFile
from klein.lora.metadata import LoraDefaults
from tests.support import fakes


def _file(scale: float | None = None, trigger: str | None = None) -> LoraFile:
    nowhere, own = Identity(0, 0, 0, 0, 0), LoraDefaults(scale, trigger)
    return LoraFile(Path("x"), "x", "0", "ai-toolkit", 1, (), (), {}, nowhere, own)


def test_what_only_the_files_know() -> None:
    """A scale left open is the file's, a missing trigger word is put in front; both are told."""
    loras = [
        {"path": "a.safetensors", "trigger": "auto"},
        {"path": "b.safetensors", "scale": 0.5, "trigger": "auto"},
        {"path": "c.safetensors", "trigger": "auto"},
        {"path": "d.safetensors"},
    ]
    params = fakes.resolved(prompt="Bob at the sea", loras=loras).params
    files: list[LoraFile | LoraError] = [
        _file(0.8, "anna"),
        _file(0.9, "bob"),
        _file(),
        LoraError("gone"),
    ]
    settled, warnings = settle_loras(params, files)
    assert [x.scale for x in settled.loras] == [0.8, 0.5, 1.0, 1.0]
    assert settled.prompt == "anna, Bob at the sea"
    told = " · ".join(warnings)
    assert "a.safetensors acts at 0.8" in told
    assert "'anna' was put in front" in told
    assert "c.safetensors has no trigger word" in told
    assert "bob" not in told
