import json
import re
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klein.core import GenerationParams, InputInfo, Margins, Timings
from klein.errors import InvalidRequest
from klein.output import metadata, response
from klein.output.images import read_text
from klein.output.marks import Marks
from tests.support import fakes

PNG = fakes.delivery()
A1111_PAIRS = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
"""How A1111 reads its last line."""

text = st.text(st.characters(codec="utf-8", exclude_characters="\r"), min_size=1, max_size=80)


@given(prompt=text.filter(str.strip), negative=text)
def test_any_prompt_comes_back(prompt: str, negative: str) -> None:
    """Even one that looks like the format itself."""
    result = fakes.result(fakes.params(prompt=prompt, negative_prompt=negative))
    request = metadata.from_text(metadata.to_text(result, result.images[0], PNG))
    assert request.prompt == prompt
    assert (request.negative_prompt or "") == negative


def test_the_request_makes_the_same_parameters() -> None:
    """What went in comes out, for each picture of a batch with its own seed."""
    values = {
        "prompt": 'x, klein: "{}"\nNegative prompt: y\nSteps: 3',
        "num_images": 2,
        "seed": 9,
        "schedule": 1.25,
        "preset": "portrait_hd",
        "guidance_scale": 3.3,
        "output_format": "webp",
        "speed": "exact_skipping",
        "loras": [
            {"path": "a.safetensors", "scale": 0.5},
            {"path": "b/c", "revision": "main"},
            {"path": "c.safetensors", "scale": [[0, -0.5], [0.25, 0], [0.5, 1]]},
            {"path": "d.safetensors", "block_weights": {"*": 0, "transformer_blocks.1": 0.5}},
        ],
    }
    result = fakes.result(fakes.params(**values))
    text = metadata.to_text(result, result.images[1], fakes.delivery(**values))
    again = metadata.from_text(text).model_dump(exclude_none=True)
    expected = fakes.resolved(**{**values, "num_images": 1, "seed": 10})
    assert fakes.resolved(**again) == expected


def test_the_proof_of_each_lora_is_in_the_picture() -> None:
    """Hash, format, rank, layers and the size of the change, for whoever finds the file later."""
    result = fakes.result(fakes.params(loras=[{"path": "a.safetensors"}, {"path": "missing"}]))
    text = metadata.to_text(result, result.images[0], PNG)
    own = json.loads(json.loads(text.rsplit(", klein: ", 1)[1]))
    (report,) = own["lora_reports"]
    assert report["sha256"] == "ab" * 32
    assert (report["layers_matched"], report["layers_in_file"]) == (4, 4)
    assert report["relative_change"] == 0.1


def test_a_lora_that_did_not_act_is_not_asked_for_again() -> None:
    """The picture was made without it."""
    result = fakes.result(fakes.params(loras=[{"path": "missing"}, {"path": "a.safetensors"}]))
    again = metadata.from_text(metadata.to_text(result, result.images[0], PNG))
    assert [lora.path for lora in again.loras] == ["a.safetensors"]


def test_the_last_seed_of_a_batch_can_be_drawn_again() -> None:
    """After the largest seed comes 0, which is a seed that a request may name."""
    result = fakes.result(fakes.params(seed=2**32 - 1, num_images=2))
    assert metadata.from_text(metadata.to_text(result, result.images[1], PNG)).seed == 0


def test_a1111_can_read_it() -> None:
    """Its own pattern finds steps, guidance, seed, size, model and LoRA hashes."""
    result = fakes.result(fakes.params(seed=5, loras=[{"path": "a.safetensors"}]))
    last = metadata.to_text(result, result.images[0], PNG).splitlines()[-1]
    pairs = dict(A1111_PAIRS.findall(last))
    assert pairs["Steps"] == "28"
    assert pairs["CFG scale"] == "2.5"
    assert pairs["Seed"] == "5"
    assert pairs["Size"] == "256x256"
    assert pairs["Model"] == "nano"
    assert pairs["Lora hashes"] == '"a.safetensors: abababababab"'


def test_the_longest_prompts_fit_into_exif() -> None:
    """A JPEG's EXIF holds 64 KB; the longest request must fit."""
    long = fakes.params(prompt="木" * 5000, negative_prompt="😀" * 5000)
    (picture,) = response.encode(fakes.result(long), fakes.delivery(output_format="jpeg"), Marks())
    assert metadata.from_text(read_text(picture.data)).prompt == "木" * 5000


@pytest.mark.parametrize("text", ["", "a cat\nSteps: 20, Sampler: Euler", 'x, klein: "{}"'])
def test_foreign_text_is_refused(text: str) -> None:
    """Pictures of other programs are said to be that."""
    with pytest.raises(InvalidRequest):
        metadata.from_text(text)


def _edited() -> GenerationParams:
    picture = InputInfo("ab" * 32, 300, 200, 288, 192, 216)
    return replace(
        fakes.params(images=["x", "x"], init_image="x", mask="x", mask_padding=7, strength=0.5),
        images=(picture, replace(picture, sha256="cd" * 32)),
        init_image=picture,
        mask=replace(picture, tokens=0),
    )


def test_pictures_are_named_by_hash_and_size() -> None:
    """By field, in order; what decided the drawing comes back as a request's fields do."""
    params, extended = _edited(), replace(_edited(), mask=None, extend=Margins(left=9))
    result = fakes.result(params)
    text = metadata.to_text(result, result.images[0], PNG)
    assert metadata.inputs_of(text) == {
        "images.0": params.images[0],
        "images.1": params.images[1],
        "init_image": params.init_image,
        "mask": params.mask,
    }
    again = metadata.from_text(text)
    assert (again.strength, again.mask_feather, again.mask_padding) == (0.5, 8, 7)
    assert (again.images, again.init_image, again.mask) == ([], None, None)
    text = metadata.to_text(fakes.result(extended), result.images[0], PNG)
    extend = metadata.from_text(text).extend
    assert extend is not None
    assert (extend.left, extend.top) == (9, 0)
    assert "mask" not in metadata.inputs_of(text)


def test_a_text_alone_names_no_pictures() -> None:
    """And comes back as a request that needs none."""
    result = fakes.result(fakes.params())
    text = metadata.to_text(result, result.images[0], PNG)
    assert metadata.inputs_of(text) == {}
    assert not fakes.resolved(
        **metadata.from_text(text).model_dump(exclude_none=True)
    ).needs_preparing


@pytest.mark.parametrize(
    "own", ["[" * 100_000, "3", "[]", '{"images": 3}', '{"mask": {"sha256": 1}}', "{"]
)
def test_damaged_names_are_refused(own: str) -> None:
    """Whatever stands where they should."""
    with pytest.raises(InvalidRequest):
        metadata.inputs_of(f"x, klein: {json.dumps(own)}")


def test_no_parameter_is_forgotten() -> None:
    """Every field of the parameters is in the text, so a new one cannot be left out."""
    result = fakes.result(fakes.params(loras=[{"path": "a.safetensors"}]))
    text = metadata.to_text(result, result.images[0], PNG)
    own = json.loads(json.loads(text.rsplit(", klein: ", 1)[1]))
    assert {field.name for field in fields(GenerationParams)} <= set(own)


def test_the_same_request_makes_the_same_text() -> None:
    """What differs from run to run, such as how long a LoRA took, stays out of the file."""
    params = fakes.params(loras=[{"path": "a.safetensors"}])
    first, second = fakes.result(params), fakes.result(params, id="another")
    slow = tuple(replace(report, seconds=9.0) for report in second.loras)
    second = replace(second, loras=slow, timings=Timings(total=99))
    texts = [metadata.to_text(each, each.images[0], PNG) for each in (first, second)]
    assert texts[0] == texts[1]
