"""`klein weights pack`: another folder, the same pictures."""

import json
from pathlib import Path

import numpy as np
import pytest

from klein.entrypoints.cli.main import main
from klein.inference.pipeline import KleinPipeline
from klein.models.identify import NANO_FOLDER
from tests.model.conftest import drawer, load
from tests.support import checkpoints

LORAS = Path("klein/nano/loras")


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
    assert sizes["text_encoder"] <= whole["text_encoder"]
    shrunk = sizes["transformer"] / whole["transformer"]
    assert shrunk < 0.65 if numbers == "float8" else 0.99 < shrunk < 1.01


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


def test_a_folder_that_is_there_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is written over."""
    monkeypatch.setenv("MODEL_ID", "nano")
    (tmp_path / "mine").write_text("x")
    assert main(["weights", "pack", str(tmp_path)]) == 2
    assert "is there already, and not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
