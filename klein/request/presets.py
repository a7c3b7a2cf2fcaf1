"""The presets: one row each, which schema, command line, `GET /presets` and README follow."""

from dataclasses import dataclass

from klein.models.samplers import DEFAULT_SAMPLER


@dataclass(frozen=True, slots=True)
class Preset:
    """Values for whatever a request leaves open. Sizes are pixels at a native size of 1024."""

    name: str
    purpose: str
    num_inference_steps: int
    guidance_scale: float
    width: int
    height: int
    schedule: str = "bfl"
    sampler: str = DEFAULT_SAMPLER
    max_sequence_length: int = 512
    turbo: bool = False
    """Whether it draws well only with a turbo LoRA on a base model."""


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("realistic_character", "natural skin for character LoRAs", 28, 2.5, 1024, 1024),
        Preset("portrait_hd", "tall portraits", 30, 3.0, 1024, 1536),
        Preset("cinematic_full", "wide scenes", 28, 3.5, 1536, 1024),
        Preset("fast_preview", "trying prompts", 15, 3.0, 1024, 1024),
        Preset("maximum_quality", "final pictures", 50, 3.5, 1024, 1024),
        Preset("edit", "editing, as fal's endpoint for base models runs", 28, 5.0, 1024, 1024),
        Preset("edit_fast", "editing, as ComfyUI's template runs", 20, 5.0, 1024, 1024),
        Preset(
            "match_training_preview",
            "looks like the samples of ai-toolkit",
            30,
            4.0,
            1024,
            1024,
            schedule="ai_toolkit",
        ),
        Preset(
            "turbo_lora",
            "8 forwards, with a turbo LoRA on a base model",
            8,
            1.0,
            1024,
            1024,
            turbo=True,
        ),
    )
}

DEFAULT_PRESET = "realistic_character"
