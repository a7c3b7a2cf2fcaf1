import pytest

from klein.models import catalog as models
from klein.models import sizes
from klein.request.formats import DEFAULT_FORMAT, FORMATS
from klein.request.presets import DEFAULT_PRESET, PRESETS

PROMISED = {
    "realistic_character": (28, 2.5, 1024, 1024, "bfl"),
    "portrait_hd": (30, 3.0, 1024, 1536, "bfl"),
    "cinematic_full": (28, 3.5, 1536, 1024, "bfl"),
    "fast_preview": (15, 3.0, 1024, 1024, "bfl"),
    "maximum_quality": (50, 3.5, 1024, 1024, "bfl"),
    "edit": (28, 5.0, 1024, 1024, "bfl"),
    "edit_fast": (20, 5.0, 1024, 1024, "bfl"),
    "match_training_preview": (30, 4.0, 1024, 1024, "ai_toolkit"),
    "turbo_lora": (8, 1.0, 1024, 1024, "bfl"),
}


def test_presets_keep_their_numbers() -> None:
    """The first worker's presets, the one that matches training previews, two for editing with the
    numbers that fal and ComfyUI publish for base models, and the one for turbo LoRAs."""
    rows = {
        p.name: (p.num_inference_steps, p.guidance_scale, p.width, p.height, p.schedule)
        for p in PRESETS.values()
    }
    assert rows == PROMISED
    assert {p.max_sequence_length for p in PRESETS.values()} == {512}
    assert DEFAULT_PRESET == "realistic_character"


def test_preset_sizes_can_be_drawn() -> None:
    """Every preset is a size the model takes, also scaled to nano's native size."""
    for preset in PRESETS.values():
        assert sizes.fault(preset.width, preset.height) is None
        assert sizes.fault(*sizes.scale_to(preset.width, preset.height, 256)) is None


@pytest.mark.parametrize(
    ("asked", "made"), [(64, 64), (70, 64), (72, 80), (1000, 1008), (1024, 1024), (3, 64)]
)
def test_nearest(asked: int, made: int) -> None:
    """The nearest multiple of 16, halves up, never under 64."""
    assert sizes.nearest(asked) == made


@pytest.mark.parametrize(
    ("width", "height", "says"),
    [
        (48, 512, "at least 64"),
        (2064, 2048, "at most 4"),
        (1024, 112, "8:1"),
        (2048, 2048, None),
        (512, 64, None),
    ],
)
def test_limits(width: int, height: int, says: str | None) -> None:
    """64 pixels, 4 megapixels and 8:1 are the limits, and each is named."""
    why = sizes.fault(width, height)
    assert (why is None) == (says is None)
    assert says is None or says in str(why)


def test_models_are_found_by_repo_and_name_in_any_case() -> None:
    """RunPod and BentoML lower-case repository names."""
    row = models.MODELS["klein-base-9B"]
    assert models.known("black-forest-labs/flux.2-klein-base-9b") is row
    assert models.known("klein-base-9b") is row
    assert models.known("somebody/else") is None


def test_geometry_tells_models_apart() -> None:
    """Weights of base and distilled models have one geometry; the flag decides."""
    assert models.by_geometry(4096, 8, 24, False).name == "klein-base-9B"
    assert models.by_geometry(4096, 8, 24, True).name == "klein-9B"
    assert models.by_geometry(3072, 5, 20, False).name == "klein-base-4B"
    strange = models.by_geometry(1024, 3, 3, True)
    assert strange.distilled
    assert strange.num_inference_steps == 4


def test_estimated_size_of_an_unknown_geometry_is_near() -> None:
    """The formula for strange models reproduces the known 9B within a tenth."""
    row = models.MODELS["klein-base-9B"]
    guess = models.by_geometry(row.hidden, row.double_blocks, row.single_blocks + 1, False)
    assert guess.transformer_bytes == pytest.approx(row.transformer_bytes, rel=0.1)


def test_distilled_models_bring_their_own_steps() -> None:
    """4 steps at guidance 1, as Black Forest Labs runs them."""
    for name in ("klein-9B", "klein-4B"):
        row = models.MODELS[name]
        assert (row.distilled, row.num_inference_steps, row.guidance_scale) == (True, 4, 1.0)


def test_formats() -> None:
    """Names, types and extensions agree with each other."""
    assert DEFAULT_FORMAT in FORMATS
    for row in FORMATS.values():
        assert row.mime_type == f"image/{row.name}"
