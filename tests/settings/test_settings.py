from pathlib import Path

import pytest

from klein.errors import BadSetting
from klein.settings import Settings


def test_defaults_are_the_9b_model() -> None:
    """An empty environment serves base-9B and decides the rest by itself."""
    settings = Settings.from_env({})
    assert settings.model_id == "black-forest-labs/FLUX.2-klein-base-9B"
    assert (settings.offload, settings.vae_tiling, settings.vae_slicing) == ("auto", "auto", False)


def test_values_are_parsed(tmp_path: Path) -> None:
    """Every kind of value arrives as its type; an empty one is unset."""
    settings = Settings.from_env(
        {
            "KLEIN_QUEUE_SIZE": "3",
            "KLEIN_TIMEOUT": "12.5",
            "KLEIN_VAE_SLICING": "ON",
            "KLEIN_OFFLOAD": "",
            "KLEIN_LORA_DIR": str(tmp_path),
            "PATH": "ignored",
        }
    )
    assert (settings.queue_size, settings.timeout, settings.vae_slicing) == (3, 12.5, True)
    assert settings.offload == "auto"
    assert settings.lora_dir == tmp_path


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("KLEIN_OFLOAD", "none", "did you mean 'KLEIN_OFFLOAD'"),
        ("KLEIN_OFFLOAD", "all", "must be one of auto, none, model, sequential"),
        ("KLEIN_QUEUE_SIZE", "many", "not a number"),
        ("KLEIN_QUEUE_SIZE", "0", "between 1 and 1000"),
        ("KLEIN_LORA_DIR", "/no/such/place", "is not a folder"),
        ("KLEIN_VAE_SLICING", "maybe", "must be one of on, off"),
    ],
)
def test_a_bad_setting_stops_the_start(name: str, value: str, says: str) -> None:
    """The sentence names the setting and what it takes."""
    with pytest.raises(BadSetting, match=name) as caught:
        Settings.from_env({name: value})
    assert says in str(caught.value)


def test_secrets_never_show() -> None:
    """A token is in no repr, so in no log."""
    settings = Settings.from_env({"HF_TOKEN": "hf_secret", "KLEIN_S3_SECRET": "s3-value"})
    assert settings.hf_token is not None
    assert settings.hf_token.value == "hf_secret"
    assert "hf_secret" not in repr(settings)
    assert "s3-value" not in repr(settings)


@pytest.mark.parametrize(
    ("text", "loras"),
    [
        ("a.safetensors", [("a.safetensors", 1.0)]),
        ("a.safetensors:0.5, o/r@v1:-1", [("a.safetensors", 0.5), ("o/r@v1", -1.0)]),
        ("civitai:123", [("civitai:123", 1.0)]),
        ("civitai:123:0.7,", [("civitai:123", 0.7)]),
        ("https://x.example/a.safetensors", [("https://x.example/a.safetensors", 1.0)]),
    ],
)
def test_base_loras(text: str, loras: list[tuple[str, float]]) -> None:
    """Named as on the command line; a Civitai version is no scale."""
    assert Settings.from_env({"KLEIN_BASE_LORAS": text}).base_loras == tuple(loras)
