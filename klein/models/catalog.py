"""What is known of each model: one row each.

Sizes in memory are bfloat16 bytes, computed from the architectures; the text encoder is counted
as klein loads it, cut to the 27 layers that are read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from klein.models.sizes import MULTIPLE

GB = 1_000_000_000


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model. `hidden` and the block counts are its transformer's; they identify a LoRA too.
    `text_linears` are the weights of the text encoder's linears, which float8 quantises."""

    name: str
    repo: str | None
    license: str
    gated: bool
    distilled: bool
    native_size: int
    hidden: int
    double_blocks: int
    single_blocks: int
    transformer_bytes: int
    text_encoder_bytes: int
    text_linears: int
    vae_bytes: int = 168_000_000
    max_sequence_length: int = 512
    num_inference_steps: int | None = None
    """Overrides the presets': only for a model that was distilled to a number of steps."""
    guidance_scale: float | None = None
    needs_gpu: bool = True

    @property
    def resident_bytes(self) -> int:
        """All weights at once."""
        return self.transformer_bytes + self.text_encoder_bytes + self.vae_bytes

    @property
    def block_parameters(self) -> int:
        """Weights of the block linears, which are what float8 quantises."""
        return self.hidden**2 * (26 * self.double_blocks + 13 * self.single_blocks)

    def bytes_of(self, *, float8: bool, float8_text: bool) -> tuple[int, int]:
        """The transformer's and the text encoder's weights, with linears in float8 or not."""
        return (
            self.transformer_bytes - float8 * self.block_parameters,
            self.text_encoder_bytes - float8_text * self.text_linears,
        )


@dataclass(frozen=True, slots=True)
class Peak:
    """GPU memory a picture takes beside the weights: `base` and `per_megapixel` (1024²), bytes."""

    base: float
    per_megapixel: float

    def of(self, width: int, height: int, reference_tokens: int = 0) -> int:
        """Bytes for an image of that size in pixels; a reference's token counts as the 16×16
        pixels of one of the image."""
        pixels = width * height + reference_tokens * MULTIPLE**2
        return int(self.base + self.per_megapixel * pixels / 1024**2)


LOW_MEMORY = "low_memory"
PEAKS: dict[str, Peak] = {
    "eager": Peak(0.1 * GB, 2.6 * GB),
    "eager_skipping": Peak(0.1 * GB, 2.6 * GB),
    "exact": Peak(0.3 * GB, 1.8 * GB),
    "exact_skipping": Peak(0.3 * GB, 1.8 * GB),
    "fast": Peak(0.3 * GB, 1.6 * GB),
    "turbo": Peak(0.3 * GB, 1.6 * GB),
    LOW_MEMORY: Peak(0.3 * GB, 0.9 * GB),
}
"""By tier, and of a second try after memory ran out: measured with klein-base-9B on an H200 from
512×512 to 2048×2048 (SPEED.md), rounded up. Smaller models take a little less."""
CONTEXT_BYTES = 1 * GB
"""What CUDA and its libraries take for themselves."""

NON_COMMERCIAL = "FLUX Non-Commercial License"
APACHE = "Apache-2.0"

_9B = {
    "native_size": 1024,
    "hidden": 4096,
    "double_blocks": 8,
    "single_blocks": 24,
    "transformer_bytes": 18_157_162_496,
    "text_encoder_bytes": 11_660_000_000,
    "text_linears": 27 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 12288),
    "license": NON_COMMERCIAL,
    "gated": True,
}
_4B = {
    "native_size": 1024,
    "hidden": 3072,
    "double_blocks": 5,
    "single_blocks": 20,
    "transformer_bytes": 7_751_089_152,
    "text_encoder_bytes": 6_230_000_000,
    "text_linears": 27 * 2560 * (2 * 4096 + 2 * 1024 + 3 * 9728),
    "license": APACHE,
    "gated": False,
}
_DISTILLED = {"distilled": True, "num_inference_steps": 4, "guidance_scale": 1.0}


def _row(name: str, repo: str | None, *parts: Mapping[str, Any], **own: Any) -> ModelSpec:
    merged: dict[str, Any] = {"distilled": False}
    for part in (*parts, own):
        merged.update(part)
    return ModelSpec(name=name, repo=repo, **merged)


MODELS: dict[str, ModelSpec] = {
    row.name: row
    for row in (
        _row("klein-base-9B", "black-forest-labs/FLUX.2-klein-base-9B", _9B),
        _row("klein-9B", "black-forest-labs/FLUX.2-klein-9B", _9B, _DISTILLED),
        _row("klein-base-4B", "black-forest-labs/FLUX.2-klein-base-4B", _4B),
        _row("klein-4B", "black-forest-labs/FLUX.2-klein-4B", _4B, _DISTILLED),
        _row(
            "nano",
            None,
            license=APACHE,
            gated=False,
            native_size=256,
            hidden=192,
            double_blocks=2,
            single_blocks=4,
            transformer_bytes=9_300_000,
            text_encoder_bytes=1_600_000,
            text_linears=27 * 64 * (2 * 64 + 2 * 32 + 3 * 72),
            vae_bytes=2_200_000,
            max_sequence_length=128,
            needs_gpu=False,
        ),
    )
}


def known(model_id: str) -> ModelSpec | None:
    """The row of a Hub id or of a name in the table, whatever its case."""
    wanted = model_id.lower()
    for row in MODELS.values():
        if wanted in (row.name.lower(), (row.repo or row.name).lower()):
            return row
    return None


def by_geometry(hidden: int, double_blocks: int, single_blocks: int, distilled: bool) -> ModelSpec:
    """The row of a folder's transformer; one of its own for a geometry that is not in the table."""
    for row in MODELS.values():
        if (row.hidden, row.double_blocks, row.single_blocks, row.distilled) == (
            hidden,
            double_blocks,
            single_blocks,
            distilled,
        ):
            return row
    extra = _DISTILLED if distilled else {}
    made = _row(
        f"custom-{double_blocks}x{single_blocks}x{hidden}",
        None,
        extra,
        license="unknown",
        gated=False,
        native_size=1024 if hidden >= 1024 else 256,
        hidden=hidden,
        double_blocks=double_blocks,
        single_blocks=single_blocks,
        transformer_bytes=0,
        text_encoder_bytes=0,
        text_linears=0,
        needs_gpu=hidden >= 1024,
    )
    return replace(made, transformer_bytes=2 * made.block_parameters)
