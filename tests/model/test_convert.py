from pathlib import Path

import numpy as np
import pytest
import torch

from klein.entrypoints.cli import main as cli
from tests.model.conftest import Draw
from tests.model.stock import stock
from tests.model.test_adapters import FORMATS, SHAPES
from tests.support import loras, tiny


@pytest.mark.parametrize(
    "name", ["ai-toolkit with alpha", "kohya", "LoHa", "LoKr decomposed", "linear1_qkv"]
)
def test_a_converted_file_is_the_same_lora_elsewhere(
    name: str, tiny_folder: Path, tmp_path: Path, lora_folder: Path, draw: Draw
) -> None:
    """diffusers' own loader, which knows fewer formats, draws what klein draws."""
    tensors, _, _ = FORMATS[name]()
    source = loras.write(lora_folder / "source.safetensors", tensors)
    clean = tmp_path / "clean.safetensors"
    assert cli.main(["lora", "convert", str(source), str(clean)]) == 0
    diffusers = stock(tiny_folder)
    diffusers.load_lora_weights(str(tmp_path), weight_name=clean.name, adapter_name="a")
    expected = diffusers(
        prompt="a portrait",
        width=64,
        height=64,
        num_inference_steps=2,
        guidance_scale=2.5,
        max_sequence_length=64,
        generator=torch.Generator("cpu").manual_seed(1),
    ).images[0]
    made = draw(loras=[{"path": source.name}], lora_error="fail").images[0].image
    off = np.abs(np.asarray(made, int) - np.asarray(expected, int))
    assert off.max() <= 2


LAYER = "single_blocks.0.linear2"
HELD = {
    "is a DoRA: what it does depends on the weights": loras.ai_toolkit({LAYER: SHAPES[LAYER]})[0]
    | {f"diffusion_model.{LAYER}.magnitude": loras.random((tiny.HIDDEN,), 1)},
    "is an OFT": {f"diffusion_model.{LAYER}.oft_R.weight": loras.random((16, 28), 1)},
    "changes the norm": {
        "diffusion_model.single_blocks.0.norm.query_norm.diff": loras.random((16,), 1)
    },
}


@pytest.mark.parametrize("says", HELD)
def test_what_cannot_be_converted_is_said(
    says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What depends on the weights it is put on, and what the format has no words for."""
    source = loras.write(tmp_path / "source.safetensors", HELD[says])
    assert cli.main(["lora", "convert", str(source), str(tmp_path / "x.safetensors")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()


def test_lora_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """add, list, inspect and remove, as a person types them."""
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.setenv("KLEIN_LORA_DIR", str(folder))
    monkeypatch.setenv("KLEIN_LORA_CACHE", str(tmp_path / "cache"))
    tensors, metadata = loras.ai_toolkit(SHAPES, trigger="zib")
    source = loras.write(tmp_path / "made.safetensors", tensors, metadata)
    assert cli.main(["lora", "add", str(source), "--name", "anna.safetensors"]) == 0
    assert cli.main(["lora", "list"]) == 0
    printed = capsys.readouterr().out
    assert "anna.safetensors: ai-toolkit, rank 4, for another model (width 32)" in printed
    assert "trigger zib" in printed
    assert cli.main(["lora", "inspect", str(source)]) == 0
    assert '"trigger_words": [\n    "zib"' in capsys.readouterr().out
    assert cli.main(["lora", "remove", "anna.safetensors"]) == 0
    assert cli.main(["lora", "remove", "anna.safetensors"]) == 2
    assert not list(folder.iterdir())
