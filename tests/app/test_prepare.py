from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from klein.app.prepare import settle_loras
from klein.errors import InvalidRequest, LoraError
from klein.lora.file import Identity, LoraFile
from klein.lora.metadata import MAX_TRIGGER, LoraDefaults
from klein.lora.spec import LoraSpec
from klein.models.catalog import MODELS
from klein.output.metadata import from_text, to_text
from klein.request.resolve import resolve
from klein.request.schema import MAX_PROMPT
from klein.sources.reference import parse
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


def test_a_trigger_word_that_is_too_much_is_said() -> None:
    """A prompt that is drawn can be asked for again, by `--like` too."""
    params = fakes.resolved(prompt="x" * (MAX_PROMPT - 6), loras=[AUTO]).params
    with pytest.raises(InvalidRequest, match=r"'annabel' of a\.safetensors it has 5003") as caught:
        settle_loras(params, [_file(trigger="annabel")])
    assert caught.value.field == "prompt"
    settled, _ = settle_loras(params, [_file(trigger="anna")])
    assert len(settled.prompt) == MAX_PROMPT


def test_what_is_left_out_is_said() -> None:
    """Of a file with changes of a text encoder."""
    params = fakes.resolved(loras=[{"path": "a.safetensors"}]).params
    _, warnings = settle_loras(params, [replace(_file(), left_out=24)])
    assert warnings == (
        "a.safetensors acts without its 24 tensors for a text encoder: only the transformer is "
        "changed by LoRAs",
    )


AUTO = {"path": "a.safetensors", "trigger": "auto"}


@pytest.mark.parametrize(
    ("spec", "own"),
    [
        ({"path": "a.safetensors", "trigger": "auto"}, (-4.0, "x" * MAX_TRIGGER)),
        ({"path": "a.safetensors", "scale": 1e-300}, (None, None)),
        ({"path": "https://civitai.com/models/1/x?modelVersionId=77&token=a"}, (0.25, None)),
        ({"path": f"https://a.example:8443/b/c.safetensors?size=2#sha256={'e' * 64}"}, (4, None)),
        ({"path": "me/one", "weight_name": "w.safetensors", "revision": "v2"}, (None, None)),
        ({"path": "civitai:77", "trigger": "auto"}, (None, 'a "quoted", word: <x>\\')),
    ],
    ids=range(6),
)
def test_like_asks_for_the_same_again(
    spec: dict[str, Any], own: tuple[float | None, str | None]
) -> None:
    """What was settled of prompt and LoRAs comes out of the image's text as it was drawn."""
    params = fakes.resolved(prompt="at the sea", loras=[spec]).params
    settled, _ = settle_loras(params, [_file(*own)])
    made = fakes.result(settled)
    asked = from_text(to_text(made, made.images[0], fakes.delivery()))
    (lora,) = asked.loras
    again, _ = settle_loras(resolve(asked, MODELS["nano"], lambda: 1).params, [_file(*own)])
    assert again.prompt == settled.prompt
    assert [x.scale for x in again.loras] == [x.scale for x in settled.loras]
    first = LoraSpec(**spec)
    assert parse(lora.path, lora.weight_name, lora.revision) == parse(
        first.path, first.weight_name, first.revision
    )
