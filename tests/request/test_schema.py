from typing import Any

import pytest

from klein.errors import InvalidRequest
from klein.request.schema import GenerateRequest, parse


@pytest.mark.parametrize(
    ("values", "field", "says"),
    [
        ({"steps": 3}, None, "did you mean 'num_inference_steps'"),
        ({"lora": "x"}, None, "did you mean 'lora"),
        ({"loras": [{"path": "x", "strength": 1}]}, "loras.0", "known are path, scale"),
        ({"prompt": "  "}, None, "say what to draw"),
        ({"prompt": ""}, "prompt", "at least 1 character"),
        ({"preset": "portrait"}, "preset", "did you mean 'portrait_hd'"),
        ({"schedule": "flux"}, "schedule", "known are bfl, ai_toolkit, linear"),
        ({"schedule": 99}, "schedule", "from -2.0 to 8.0"),
        ({"schedule": True}, "schedule", "a name, a list of noise levels, or mu"),
        ({"schedule": [1.0, "0.5"]}, "schedule", "noise levels are numbers"),
        ({"schedule": [0.5, 0.5]}, "schedule", "must fall"),
        ({"schedule": [1.5, 0.5]}, "schedule", "above 0 and at most 1"),
        ({"schedule": [0]}, "schedule", "0 noise levels are given, 1 to 100"),
        ({"schedule": [10**400, 0.5]}, "schedule", "above 0 and at most 1"),
        ({"schedule": [float("nan")]}, "schedule", "above 0 and at most 1"),
        ({"schedule": "1,x"}, "schedule", "known are bfl"),
        ({"output_format": "gif"}, "output_format", "known are png, jpeg, webp"),
        ({"num_inference_steps": 0}, "num_inference_steps", "greater than or equal to 1"),
        ({"num_inference_steps": 101}, "num_inference_steps", "less than or equal to 100"),
        ({"guidance_scale": float("nan")}, "guidance_scale", "finite"),
        ({"guidance_scale": 21}, "guidance_scale", "less than or equal to 20"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"seed": 2**32}, "seed", "less than or equal to 4294967295"),
        ({"num_images": 5}, "num_images", "less than or equal to 4"),
        ({"loras": [{"path": "x", "scale": 5}]}, "loras.0.scale", "less than or equal to 4"),
        ({"loras": [{"path": "x"}] * 9}, "loras", "at most 8"),
        ({"lora_error": "ignore"}, "lora_error", "'continue' or 'fail'"),
        ({"return_type": "s3"}, "return_type", "known are base64, url"),
        ({"max_sequence_length": 513}, "max_sequence_length", "less than or equal to 512"),
        ({"num_inference_steps": True}, "num_inference_steps", "must be a number"),
        ({"num_inference_steps": "5"}, "num_inference_steps", "must be a number"),
        ({"seed": True}, "seed", "must be a number"),
        ({"guidance_scale": "2.5"}, "guidance_scale", "must be a number"),
        ({"guidance_scale": True}, "guidance_scale", "must be a number"),
        ({"loras": [{"path": "a", "scale": True}]}, "loras.0.scale", "must be a number"),
        *(
            ({"loras": [{"path": "a", "scale": points}]}, "loras.0.scale", says)
            for points, says in (
                ([], "1 to 8 points, not 0"),
                ([[0, 1]] * 9, "1 to 8 points, not 9"),
                ([[0.1, 1]], "begins with the fraction 0"),
                ([[0, 1], [1.0, 0]], "from 0 to below 1"),
                ([[0, 1], [0.5, 0], [0.4, 1]], "rise from point to point"),
                ([[0, 1], [0, 2]], "rise from point to point"),
                ([[0, float("nan")]], "scales from -4 to 4"),
                ([[float("nan"), 1]], "begins with the fraction 0"),
                ([[0, 1], [float("nan"), 1]], "from 0 to below 1"),
                ([[0, -4.1]], "scales from -4 to 4"),
                ([[0, 10**400]], "scales from -4 to 4"),
                ([[0, True]], "pairs of a fraction of the run and a scale"),
                ([[0, "1"]], "pairs of a fraction"),
                ([0, 1], "pairs of a fraction"),
                ([[0, 1, 2]], "pairs of a fraction"),
                ({"0": 1}, "valid number"),
                (10**400, "less than or equal to 4"),
            )
        ),
        *(
            (
                {"loras": [{"path": "a", "block_weights": weights}]},
                f"loras.0.block_weights{at}",
                says,
            )
            for weights, at, says in (
                ({"*": 5}, ".*", "less than or equal to 4"),
                ({"*": float("nan")}, ".*", "finite"),
                ({"*": [[0, 1]]}, ".*", "valid number"),
                ({"": 1}, "", "1 to 100 characters"),
                ({"x" * 10**6: 1}, "", "1 to 100 characters"),
                ({str(n): 1 for n in range(65)}, "", "64 patterns are the most"),
                ([], "", "valid dictionary"),
            )
        ),
        ({"speed": "warp"}, "speed", "known are eager, eager_skipping, exact"),
        ({"speed": "auto"}, "speed", "known are eager"),
        ({"output_quality": 0}, "output_quality", "greater than or equal to 1"),
    ],
)
def test_bad_values_name_the_field_and_the_way_out(
    values: dict[str, Any], field: str | None, says: str
) -> None:
    """One sentence a caller can act on."""
    with pytest.raises(InvalidRequest) as caught:
        parse({"prompt": "a portrait", **values})
    assert caught.value.field == field
    assert says in str(caught.value)


def test_what_clients_send_is_taken() -> None:
    """Floats without a fraction, jpg, a mu as number or text."""
    request = parse(
        {
            "prompt": "x",
            "num_inference_steps": 28.0,
            "width": 512.0,
            "output_format": "jpg",
            "schedule": "1.5",
        }
    )
    assert request.num_inference_steps == 28
    assert request.width == 512
    assert request.output_format == "jpeg"
    assert request.schedule == 1.5


def test_the_first_workers_sample_is_taken() -> None:
    """The predecessor's test_input.json works unchanged."""
    request = parse(
        {
            "prompt": "a professional portrait photograph of TOK",
            "negative_prompt": "cartoon, anime",
            "preset": "realistic_character",
            "seed": 42,
            "num_images": 1,
            "output_format": "png",
            "lora_path": "",
            "lora_scale": 1.0,
        }
    )
    assert request.lora_path is None


def test_every_field_is_described() -> None:
    """Schema, command line and README show the description."""
    for name, field in GenerateRequest.model_fields.items():
        assert field.description, name


def test_noise_levels_as_json_and_as_text() -> None:
    """The last 0 may be there or not."""
    for given in ([1, 0.65, 0.4], [1.0, 0.65, 0.4, 0.0], "1.0, 0.65,0.4", "1,0.65,0.4,0"):
        assert parse({"prompt": "x", "schedule": given}).schedule == (1.0, 0.65, 0.4)
