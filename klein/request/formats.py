"""The picture formats: one row each."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """How a picture is written. `quality` is False for formats that ignore `output_quality`;
    `exact_from` is the least quality that keeps every pixel, above 100 if none does."""

    name: str
    mime_type: str
    extension: str
    quality: bool
    exact_from: int
    note: str

    def is_exact(self, quality: int) -> bool:
        """Whether every pixel comes back as it was."""
        return quality >= self.exact_from


FORMATS: dict[str, OutputFormat] = {
    row.name: row
    for row in (
        OutputFormat("png", "image/png", "png", False, 1, "exact; the largest"),
        OutputFormat("jpeg", "image/jpeg", "jpg", True, 101, "small; opens everywhere"),
        OutputFormat("webp", "image/webp", "webp", True, 100, "smaller still; 100 is lossless"),
    )
}

FORMAT_ALIASES = {"jpg": "jpeg"}
DEFAULT_FORMAT = "png"
DEFAULT_QUALITY = 95

RETURN_TYPES = {
    "base64": "the picture's bytes in the answer",
    "url": "a link into your bucket (needs KLEIN_S3_…)",
}
