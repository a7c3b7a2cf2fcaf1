"""`klein lora extract`: a model's difference to another as a LoRA that klein applies."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from klein.entrypoints.cli.main import main
from klein.inference.pipeline import KleinPipeline
from tests.model.conftest import drawer, load
from tests.support import checkpoints

RANK = 6
NANO = {name: x.float() for name, x in checkpoints.nano().items()}


def _other(rank: int) -> dict[str, Tensor]:
    """nano with a difference of that rank in every linear, and another norm."""
    made, generator = {}, torch.Generator().manual_seed(5)
    for name, weight in NANO.items():
        made[name] = weight.clone()
        if weight.ndim == 2:
            up = torch.randn(weight.shape[0], rank, generator=generator)
            down = torch.randn(rank, weight.shape[1], generator=generator)
            made[name] += 0.02 * weight.norm() / (up @ down).norm() * (up @ down)
    made["transformer_blocks.0.attn.norm_q.weight"] += 0.01
    return made


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base.safetensors as diffusers names it, other.safetensors as Black Forest Labs do."""
    folder = tmp_path_factory.mktemp("extract")
    checkpoints.write(folder / "base.safetensors", NANO)
    checkpoints.write(folder / "other.safetensors", checkpoints.bfl(_other(RANK)))
    return folder


def _extract(files: Path, rank: int, name: str) -> int:
    model, base = (str(files / f"{x}.safetensors") for x in ("other", "base"))
    to = str(files / name)
    return main(["lora", "extract", model, base, "--rank", str(rank), "-o", to])


def _weights(pipe: KleinPipeline) -> dict[str, Tensor]:
    return {
        name: layer.weight.clone()
        for name, layer in pipe.parts.transformer.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }


def test_a_difference_of_that_rank_is_kept_whole(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the LoRA on, the base model's linears are the other's, within bfloat16 of the LoRA."""
    assert _extract(files, RANK, "turbo.safetensors") == 0
    shown = capsys.readouterr()
    assert "41 layers, rank 6" in shown.out
    assert "100.00% of the difference's energy" in shown.out
    assert "1 norms differ too" in shown.err
    pipe = load("nano", files, None)
    before = _weights(pipe)
    result = drawer(pipe)(num_inference_steps=1, loras=[{"path": "turbo.safetensors"}])
    assert result.loras[0].layers_matched == 41
    expected = _other(RANK)
    for name, weight in _weights(pipe).items():
        wanted = expected[f"{name}.weight"]
        assert (weight - wanted).norm() < 0.01 * (before[name] - wanted).norm()


def test_a_smaller_rank_keeps_what_it_can(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The best product of that rank; the report says how much that is."""
    assert _extract(files, 3, "small.safetensors") == 0
    kept = re.search(r"([\d.]+)% of the difference's energy", capsys.readouterr().out)
    assert kept
    assert 40 < float(kept[1]) < 80


@pytest.mark.parametrize(
    ("change", "says", "code"),
    [
        ({"--rank": "0"}, "0 is not from 1 to 512", 2),
        ({"-o": "x.bin"}, "name a .safetensors file", 2),
        ({"-o": "nowhere/x.safetensors"}, "in a folder that is there", 2),
    ],
)
def test_what_cannot_be_extracted(
    files: Path,
    change: dict[str, str],
    says: str,
    code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Said before anything is read."""
    base = str(files / "base.safetensors")
    flags = {"--rank": "4", "-o": str(files / "x.safetensors"), **change}
    assert main(["lora", "extract", base, base, *(x for row in flags.items() for x in row)]) == code
    assert says in capsys.readouterr().err


def test_equal_models_and_other_shapes(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There is nothing to write, and nothing is written."""
    base, to = str(files / "base.safetensors"), files / "none.safetensors"
    assert main(["lora", "extract", base, base, "-o", str(to)]) != 0
    assert "have the same linears" in capsys.readouterr().err
    fewer = {k: x for k, x in NANO.items() if "single_transformer_blocks.3" not in k}
    other = checkpoints.write(files / "fewer.safetensors", fewer)
    assert main(["lora", "extract", str(other), base, "-o", str(to)]) != 0
    assert "both must be of one shape" in capsys.readouterr().err
    assert not to.exists()
