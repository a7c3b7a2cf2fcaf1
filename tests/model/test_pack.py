"""`klein weights pack`: another folder, the same pictures."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from klein.entrypoints.cli.main import main
from klein.errors import InvalidRequest, KleinError
from klein.inference import pack as packing
from klein.inference.acceleration.ops import float8_copy
from klein.inference.pipeline import KleinPipeline
from klein.models.identify import NANO_FOLDER
from klein.models.plan import locate_model
from klein.settings import Settings
from tests.model.conftest import drawer, load
from tests.support import checkpoints

LORAS = Path("klein/nano/loras")
NANO = Settings(model_id="nano")


def pixels(pipe: KleinPipeline, **values: object) -> np.ndarray:
    made = drawer(pipe)(prompt="a woman with a green hat", num_inference_steps=2, **values)
    return np.asarray(made.images[0].image)


@pytest.fixture(scope="module", params=["float8", "bfloat16"])
def numbers(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(numbers: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano, packed by the command."""
    to = tmp_path_factory.mktemp("packed") / "nano"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODEL_ID", "nano")
        assert main(["weights", "pack", str(to), "--numbers", numbers]) == 0
    return to


def test_a_packed_model_draws_the_same(folder: Path, numbers: str) -> None:
    """Bit for bit what the unpacked start draws in the tiers it is for."""
    for speed in ("fast",) if numbers == "float8" else ("fast", "eager"):
        packed, stock = (load(model, LORAS, None, KLEIN_SPEED=speed) for model in (folder, "nano"))
        assert np.array_equal(pixels(packed), pixels(stock))


def test_a_packed_model_is_smaller_and_says_what_it_is(folder: Path, numbers: str) -> None:
    """Nothing that is not read, and half of the transformer's bytes in float8."""
    note = json.loads((folder / "klein.json").read_text())
    assert (note["model"], note["license"]) == ("nano", "Apache-2.0")
    sizes = {path.parent.name: path.stat().st_size for path in folder.glob("*/*.safetensors")}
    stock = NANO_FOLDER / "model"
    whole = {path.parent.name: path.stat().st_size for path in stock.glob("*/*.safetensors")}
    assert sizes.keys() == whole.keys()
    for part, most in (("text_encoder", 0.62), ("transformer", 0.65)):
        shrunk = sizes[part] / whole[part]
        assert shrunk < most if numbers == "float8" else 0.9 < shrunk < 1.01


def test_a_float8_pack_starts_in_the_exact_tiers(folder: Path, numbers: str) -> None:
    """Made full once, and the text encoder where a setting wants that; what was lost stays lost."""
    if numbers != "float8":
        pytest.skip("has no float8")
    fast = load("nano", LORAS, None, KLEIN_SPEED="fast")
    layer = "model.layers.26.mlp.down_proj"
    values, scale = float8_copy(fast.parts.text_encoder.get_submodule(layer))
    for settings in ({"KLEIN_SPEED": "fast", "KLEIN_TEXT_ENCODER": "bfloat16"}, {}):
        pipe = load(folder, LORAS, None, **settings)
        weight = pipe.parts.text_encoder.get_submodule(layer).weight
        expected = (values.float() * scale.T)[: len(weight), : weight.shape[1]]
        assert torch.equal(weight, expected)
    assert 0 < np.abs(pixels(pipe).astype(np.int16) - pixels(load("nano", LORAS))).mean() < 20


def test_a_packed_folder_is_packed_again(folder: Path, numbers: str, tmp_path: Path) -> None:
    """The same bytes come out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODEL_ID", str(folder))
        assert main(["weights", "pack", str(tmp_path / "b"), "--numbers", numbers]) == 0
    for path in folder.glob("*/*.safetensors"):
        again = tmp_path / "b" / path.relative_to(folder)
        assert again.read_bytes() == path.read_bytes()


def test_the_setting_keeps_the_text_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KLEIN_TEXT_ENCODER=bfloat16 packs it as it is beside a float8 transformer."""
    monkeypatch.setenv("MODEL_ID", "nano")
    monkeypatch.setenv("KLEIN_TEXT_ENCODER", "bfloat16")
    assert main(["weights", "pack", str(tmp_path / "a")]) == 0
    with safe_open(tmp_path / "a" / "text_encoder" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    with safe_open(next((tmp_path / "a" / "transformer").glob("*.safetensors")), "pt") as file:
        assert torch.float8_e4m3fn in {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118


def test_a_checkpoint_is_packed_into_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What KLEIN_TRANSFORMER names is in it, as it was; `weights list` says where it comes from."""
    tensors = checkpoints.float8(checkpoints.bfl(checkpoints.nano()), rows=False)
    file = checkpoints.write(tmp_path / "fine.safetensors", tensors)
    monkeypatch.setenv("MODEL_ID", "nano")
    monkeypatch.setenv("KLEIN_TRANSFORMER", str(file))
    assert main(["weights", "pack", str(tmp_path / "a")]) == 0
    assert main(["weights", "list"]) == 0
    assert "transformer: fine.safetensors, float8 with a scale for each layer" in (
        capsys.readouterr().out
    )
    packed = load(tmp_path / "a", LORAS, None, KLEIN_SPEED="fast")
    loose = load("nano", LORAS, None, KLEIN_SPEED="fast", KLEIN_TRANSFORMER=str(file))
    assert np.array_equal(pixels(packed), pixels(loose))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_pack_leaves_nothing(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, or Ctrl-C, in the middle."""

    def save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        if path.parent.name == "transformer":
            path.write_bytes(b"half")
            raise error
        save_file(tensors, path, metadata)

    monkeypatch.setattr(packing, "save_file", save)
    monkeypatch.setenv("MODEL_ID", "nano")
    with pytest.raises(type(error)):
        packing.pack(locate_model(NANO), tmp_path / "a", float8=True, float8_text=True)
    assert not list(tmp_path.iterdir())


KILLED = """
import os, sys
from pathlib import Path
from klein.inference import pack
from klein.models.plan import locate_model
from klein.settings import Settings
write = pack._write_note
pack._write_note = lambda *given: (write(*given), os.kill(os.getpid(), 9))
pack.pack(locate_model(Settings(model_id="nano")), Path(sys.argv[1]), float8=True, float8_text=True)
"""
"""Packs nano and dies when all is written but nothing is in its place."""


def test_a_killed_pack_leaves_no_model_and_is_begun_again(tmp_path: Path) -> None:
    """What it leaves is beside the folder, under a name that says so, and goes with the next."""
    to = tmp_path / "a"
    died = subprocess.run([sys.executable, "-c", KILLED, str(to)], check=False, timeout=120)
    assert died.returncode == -9
    assert [path.name for path in tmp_path.iterdir()] == ["a.unfinished"]
    (tmp_path / "a.unfinished" / "stray").write_text("x")
    packing.pack(locate_model(NANO), to, float8=True, float8_text=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (to / "model_index.json").is_file()
    assert not (to / "stray").exists()


def test_two_packs_into_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is refused, and the first goes on."""
    inner: list[KleinError] = []

    def save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        if not inner:
            with pytest.raises(InvalidRequest, match="is being packed already") as caught:
                packing.pack(locate_model(NANO), tmp_path / "a", float8=False, float8_text=False)
            inner.append(caught.value)
        save_file(tensors, path, metadata)

    monkeypatch.setattr(packing, "save_file", save)
    packing.pack(locate_model(NANO), tmp_path / "a", float8=False, float8_text=False)
    assert inner
    assert (tmp_path / "a" / "model_index.json").is_file()


def test_a_folder_that_is_there_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is written over."""
    monkeypatch.setenv("MODEL_ID", "nano")
    (tmp_path / "mine").write_text("x")
    assert main(["weights", "pack", str(tmp_path)]) == 2
    assert "is there already, and not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
