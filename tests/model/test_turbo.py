"""nano's turbo LoRA: 8 forwards without guidance for 56 with it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from klein.entrypoints.cli.main import main
from klein.inference.pipeline import KleinPipeline
from klein.models.identify import NANO_FOLDER
from tests.model.conftest import drawer, load, pictures_of
from tests.support import checkpoints
from training.captions import rows
from training.check import QUICK, is_character, wrong_colours, zibbo_prompt
from training.demos import CHARACTER, demo_batch

LORAS = NANO_FOLDER / "loras"
TURBO = {"path": "turbo.safetensors"}


@pytest.fixture(scope="module")
def pipe() -> KleinPipeline:
    return load("nano", LORAS)


def turbo(pipe: KleinPipeline, prompt: str, *more: dict[str, str], seed: int = 1) -> Tensor:
    """One image of the preset, in the forwards that it promises."""
    made = drawer(pipe)(
        prompt=prompt, seed=seed, preset="turbo_lora", num_inference_steps=8, loras=[TURBO, *more]
    )
    assert made.forwards == 8
    assert not made.warnings
    return pictures_of(made)[0]


@pytest.mark.parametrize(("prompt", "wanted"), QUICK)
def test_eight_forwards_draw_what_is_asked(
    prompt: str, wanted: dict[str, str], pipe: KleinPipeline
) -> None:
    """Every colour that the prompt names."""
    assert not wrong_colours(turbo(pipe, prompt), wanted)


def test_the_character_stays(pipe: KleinPipeline) -> None:
    """With its own LoRA on top, in all images but one: the judge misses one in twenty, of those of
    56 forwards and of true drawings, too."""
    prompts = [zibbo_prompt(row) for row in rows(demo_batch(CHARACTER, 4, 6001))]
    drawn = [
        turbo(pipe, text, {"path": "zibbo.safetensors"}, seed=2000 + number)
        for number, text in enumerate(prompts)
    ]
    assert is_character(torch.stack(drawn)).sum() >= 3


def test_it_is_what_klein_extracts_from_the_distilled_model(
    pipe: KleinPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """nano with it merged, minus nano: the same LoRA, whole at its own rank."""
    stock = checkpoints.nano()
    turbo(pipe, "a portrait")
    student = {name: x.clone() for name, x in pipe.parts.transformer.state_dict().items()}
    for name, tensors in (("student", student), ("base", {k: x.float() for k, x in stock.items()})):
        checkpoints.write(tmp_path / f"{name}.safetensors", tensors)
    model, base, to = (str(tmp_path / f"{x}.safetensors") for x in ("student", "base", "turbo"))
    assert main(["lora", "extract", model, base, "--rank", "8", "-o", to]) == 0
    assert "100.00% of the difference's energy" in capsys.readouterr().out
    extracted = load("nano", tmp_path)
    turbo(extracted, "a portrait")
    for name, weight in extracted.parts.transformer.state_dict().items():
        change = (student[name] - stock[name].float()).norm()
        assert (weight - student[name]).norm() <= 0.01 * change
