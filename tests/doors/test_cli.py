from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from klein.app import build
from klein.entrypoints.cli import doctor
from klein.entrypoints.cli.generate import parse_lora
from klein.entrypoints.cli.main import main
from klein.errors import LoraError
from klein.models.catalog import GB
from klein.models.machine import Device, Machine
from klein.models.schedule import SCHEDULES
from klein.request.formats import FORMATS
from klein.request.presets import PRESETS
from klein.request.schema import GenerateRequest
from klein.settings import Settings
from tests.support import fakes


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> fakes.FakePipeline:
    """The command line on the fake pipeline."""
    fake = fakes.FakePipeline()
    monkeypatch.setattr(build, "loader", lambda *_: lambda: fake)
    monkeypatch.setattr(build, "library", lambda *_: fakes.FakeLibrary())
    return fake


def _run(*argv: Any) -> int:
    return main([str(arg) for arg in argv])


def test_generate_writes_the_file(
    fake: fakes.FakePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Format by extension, parameters inside, seed on stdout."""
    out = tmp_path / "a.webp"
    assert _run("generate", "a portrait", "-o", out, "--seed", 3, "--width", 250) == 0
    with Image.open(out) as picture:
        assert picture.format == "WEBP"
    shown = capsys.readouterr()
    assert f"{out}  seed 3" in shown.out
    assert "rounded" in shown.err
    assert _run("show", out) == 0
    assert "Seed: 3" in capsys.readouterr().out


def test_several_pictures_are_named_by_seed(fake: fakes.FakePipeline, tmp_path: Path) -> None:
    """None overwrites another."""
    assert _run("generate", "x", "-o", tmp_path / "a.png", "--seed", 3, "--num-images", 2) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-3.png", "a-4.png"]


def test_like_draws_a_picture_again(fake: fakes.FakePipeline, tmp_path: Path) -> None:
    """The same bytes from the file alone; what is given changes it."""
    first, again, other = (tmp_path / name for name in ("a.png", "b.png", "c.jpg"))
    lora = "some.safetensors:0.5"
    assert _run("generate", "a portrait", "-o", first, "--seed", 9, "--lora", lora) == 0
    assert _run("generate", "--like", first, "-o", again) == 0
    assert first.read_bytes() == again.read_bytes()
    assert _run("generate", "--like", first, "-o", other, "--seed", 10) == 0
    with Image.open(other) as picture:
        assert picture.format == "JPEG"


def test_like_says_when_a_lora_is_another_file(
    fake: fakes.FakePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may have been replaced, or its branch gone on; the pinned one is said nothing of."""
    first, again = tmp_path / "a.png", tmp_path / "b.png"
    _run("generate", "a portrait", "-o", first, "--seed", 9, "--lora", "some.safetensors")
    assert _run("generate", "--like", first, "-o", again) == 0
    assert "is not the file" not in capsys.readouterr().err
    draw = fake.generate

    def other(job: Any) -> Any:
        drawn = draw(job)
        return replace(drawn, loras=tuple(replace(x, sha256="cd" * 32) for x in drawn.loras))

    fake.generate = other  # type: ignore[method-assign]
    assert _run("generate", "--like", first, "-o", first) == 0
    assert "LoRA some.safetensors is not the file that a.png was" in capsys.readouterr().err


def test_every_field_has_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    """With its description."""
    with pytest.raises(SystemExit):
        _run("generate", "--help")
    shown = " ".join(capsys.readouterr().out.split())
    for name, field in GenerateRequest.model_fields.items():
        assert name == "prompt" or f"--{name.replace('_', '-')}" in shown
        assert field.description is not None
        assert field.description.split(";")[0].split("…")[0] in shown
    for name in (*PRESETS, *SCHEDULES, *FORMATS):
        assert name in shown


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["x", "-o", "a.gif"], 2, "ends in .png, .jpg"),
        (["x", "-o", "a.png", "--output-format", "webp"], 2, "a.png says 'png'"),
        (["-o", "a.png"], 2, "say what to draw"),
        (["x", "-o", "a.png", "--num-inference-steps", "many"], 2, "num_inference_steps"),
        (["x", "-o", "a.png", "--loras", "{"], 2, "--lora PATH:SCALE is simpler"),
        (["x", "-o", "a.png", "--lora", "x:notanumber"], 2, "lora: 'notanumber' after 'x'"),
        (["x", "-o", "a.png", "--lora", "x:nan"], 2, "loras.0.scale"),
        (["x", "-o", "/no/such/folder/a.png"], 2, "there is no folder"),
        (["--like", "nothing.png", "-o", "a.png"], 2, "nothing.png cannot be read"),
    ],
)
def test_the_callers_faults_exit_with_2(
    fake: fakes.FakePipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    code: int,
    says: str,
) -> None:
    """One line on stderr, no traceback, no file."""
    monkeypatch.chdir(tmp_path)
    assert _run("generate", *argv) == code
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_other_faults_have_other_codes(
    fake: fakes.FakePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A LoRA that fails is the caller's, anything unknown is ours."""
    fake.fail = LoraError("no such LoRA")
    assert _run("generate", "x", "-o", tmp_path / "a.png") == 2
    fake.fail = RuntimeError("?")
    assert _run("generate", "x", "-o", tmp_path / "a.png") == 70


def test_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """All of them, and which is the default."""
    assert _run("presets") == 0
    shown = capsys.readouterr().out
    for name in PRESETS:
        assert name in shown
    assert shown.count("(default)") == 1


def test_doctor_tells_what_can_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Machine, software, every model, and what would happen now."""
    monkeypatch.setenv("MODEL_ID", "./nowhere")
    assert _run("doctor") == 0
    shown = capsys.readouterr().out
    assert "MODEL_ID=./nowhere cannot start: MODEL_ID: there is no folder" in shown
    for name in ("klein-base-9B", "klein-4B", "nano", "memory", "bentoml"):
        assert name in shown


def test_doctor_counts_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """And says what would use them."""
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "ray" else "1.0")
    gpu = Device("cuda", "H200", 140 * GB, 139 * GB, (9, 0))
    for count, told in ((0, None), (1, "use one"), (4, "klein serve --replicas 4 uses all 4")):
        machine = replace(Machine.probe({}), gpus=(gpu,) * count)
        lines = [line for line in doctor.report(Settings(), machine) if "  GPUs " in line]
        assert len(lines) == (told is not None)
        assert told is None or told in lines[0]
        assert count < 2 or "pip install 'klein[ray]'" in lines[0]


@pytest.mark.skipif(find_spec("ray") is not None, reason="it is for those who have no Ray")
def test_serve_says_what_to_install(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("serve", "--replicas", "2") == 2
    assert "pip install 'klein[ray]'" in capsys.readouterr().err


def test_doctor_looks_at_more_than_the_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not promise a start that a setting will end."""
    monkeypatch.setenv("MODEL_ID", "nano")
    monkeypatch.setenv("KLEIN_WEBHOOK_SECRET", "x")
    assert _run("doctor") == 0
    assert "MODEL_ID=nano cannot start: KLEIN_WEBHOOK_SECRET" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "says"),
    [(None, "cannot be read (FileNotFoundError)"), ("# none\n\n", "there is no key in it")],
)
def test_doctor_looks_at_the_file_of_keys(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    text: str | None,
    says: str,
) -> None:
    """As the start does."""
    if text is not None:
        (tmp_path / "keys").write_text(text)
    monkeypatch.setenv("MODEL_ID", "nano")
    monkeypatch.setenv("KLEIN_API_KEYS_FILE", str(tmp_path / "keys"))
    assert _run("doctor") == 0
    assert f"MODEL_ID=nano cannot start: KLEIN_API_KEYS_FILE: {says}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("owner/repo@v1", "owner/repo@v1", None),
        ("owner/repo:-1", "owner/repo", -1.0),
        ("civitai:123", "civitai:123", None),
        ("civitai:123:0.5", "civitai:123", 0.5),
        ("https://a.example:8443/x.safetensors", "https://a.example:8443/x.safetensors", None),
        ("https://a.example/x.safetensors:0.5", "https://a.example/x.safetensors", 0.5),
        ("odd:name.safetensors", "odd:name.safetensors", None),
    ],
)
def test_lora_shorthand(text: str, path: str, scale: float | None) -> None:
    """A scale after the last colon, where that begins one."""
    expected = {"path": path} if scale is None else {"path": path, "scale": scale}
    assert parse_lora(text) == expected


@pytest.mark.parametrize("command", [["inspect", "nope"], ["convert", "nope", "x.safetensors"]])
def test_a_lora_that_is_no_file_is_the_callers_fault(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """With the way out; nothing of it is worth another try."""
    assert _run("lora", *command) == 2
    assert "klein: nope is no file here: give the path" in capsys.readouterr().err
