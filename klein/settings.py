"""The settings of a deployment: one table row each, read once from the environment by a door."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from klein.errors import BadSetting, unknown

Offload = Literal["auto", "none", "model", "sequential"]
PICTURES_MB = 50
"""Of all pictures of a request together, as files."""
OFFLOADS: tuple[Offload, ...] = ("auto", "none", "model", "sequential")
Metadata = Literal["full", "minimal", "none"]
METADATA: tuple[Metadata, ...] = ("full", "minimal", "none")


@dataclass(frozen=True, slots=True, repr=False)
class Secret:
    """A value that never shows itself in a log or a traceback."""

    value: str

    def __repr__(self) -> str:
        return "Secret(***)"


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.lower() not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return text.lower()

    return parse


def _number(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise ValueError(f"must be between {low:g} and {high:g}")
        return value

    return parse


def _switch(text: str) -> bool:
    return _choice("on", "off")(text) == "on"


def _names(text: str) -> frozenset[str]:
    return frozenset(name.strip() for name in text.split(",") if name.strip())


def _loras(text: str) -> tuple[tuple[str, float], ...]:
    """`PATH` or `PATH:SCALE`, separated by commas."""
    found = []
    for named in (part.strip() for part in text.split(",") if part.strip()):
        path, colon, scale = named.rpartition(":")
        try:
            own = float(scale) if colon and path != "civitai" else None
        except ValueError:
            own = None
        if own is not None and not -4 <= own <= 4:
            raise ValueError("must have scales between -4 and 4")
        found.append((named, 1.0) if own is None else (path, own))
    return tuple(found)


def _callable_name(text: str) -> str:
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", text):
        raise ValueError("must be package.module:name")
    return text


def _folder(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_dir():
        raise ValueError("is not a folder")
    return path


def _setting(name: str, default: Any, parse: Callable[[str], Any], doc: str) -> Any:
    return field(default=default, metadata={"env": name, "parse": parse, "doc": doc})


@dataclass(frozen=True, slots=True)
class Settings:
    """What the operator decided. Every field is an environment variable; an empty one is unset."""

    model_id: str = _setting(
        "MODEL_ID",
        "black-forest-labs/FLUX.2-klein-base-9B",
        str,
        "Hub id, a local folder, or `nano`, the built-in model",
    )
    model_revision: str | None = _setting(
        "MODEL_REVISION", None, str, "commit, tag or branch of the Hub repository"
    )
    transformer: str | None = _setting(
        "KLEIN_TRANSFORMER",
        None,
        str,
        "one .safetensors file in place of the model's transformer: a path, "
        "`owner/repo:file.safetensors[@revision]`, an https address or `civitai:VERSION`",
    )
    transformer_cache: Path = _setting(
        "KLEIN_TRANSFORMER_CACHE",
        Path("~/.cache/klein/transformers"),
        Path,
        "folder of such files that were fetched; may be a volume, or read-only",
    )
    transformer_cache_gb: float = _setting(
        "KLEIN_TRANSFORMER_CACHE_GB",
        60.0,
        _number(float, 0, 10000),
        "its size limit in GB; the longest unused goes first",
    )
    hf_token: Secret | None = _setting(
        "HF_TOKEN", None, Secret, "Hugging Face token for gated models and private LoRAs"
    )
    mode: str = _setting(
        "KLEIN_MODE",
        "serve",
        _choice("serve", "runpod"),
        "what the image starts when it is given no command: `serve` or `runpod`",
    )
    log_format: str = _setting(
        "KLEIN_LOG_FORMAT",
        "text",
        _choice("text", "json"),
        "`text`, or `json`: one object a line, with request id, job id and stage",
    )
    device: str = _setting(
        "KLEIN_DEVICE", "auto", _choice("auto", "cuda", "cpu"), "`auto`, `cuda` or `cpu`"
    )
    offload: Offload = _setting(
        "KLEIN_OFFLOAD",
        "auto",
        _choice(*OFFLOADS),
        "`auto` (from free GPU memory), `none`, `model` or `sequential`",
    )
    speed: str = _setting(
        "KLEIN_SPEED",
        "auto",
        _choice("auto", "eager", "eager_skipping", "exact", "exact_skipping", "fast", "turbo"),
        "the tier: `auto` (`exact` on a GPU, `fast` there with float8 weights, `eager` without), "
        "`eager`, `eager_skipping`, `exact`, `exact_skipping`, `fast` or `turbo`",
    )
    text_encoder: str = _setting(
        "KLEIN_TEXT_ENCODER",
        "auto",
        _choice("auto", "bfloat16"),
        "`auto` (float8 in `fast` and `turbo`) or `bfloat16`",
    )
    attention: str = _setting(
        "KLEIN_ATTENTION",
        "auto",
        _choice("auto", "cudnn", "flash", "native"),
        "`auto` (the best of these for the GPU), `cudnn`, `flash` (flash-attn) or `native` (torch)",
    )
    kernel_cache: Path = _setting(
        "KLEIN_KERNEL_CACHE",
        Path("~/.cache/klein/kernels"),
        Path,
        "folder of compiled kernels; on a volume the next worker finds them",
    )
    vae_slicing: bool = _setting(
        "KLEIN_VAE_SLICING", False, _switch, "`on` sets it; pictures are decoded one by one anyway"
    )
    vae_tiling: str = _setting(
        "KLEIN_VAE_TILING",
        "auto",
        _choice("auto", "on", "off"),
        "`auto` (only when a decode would not fit), `on` or `off`",
    )
    lora_dir: Path | None = _setting(
        "KLEIN_LORA_DIR", None, _folder, "the only folder local LoRAs are read from"
    )
    base_loras: tuple[tuple[str, float], ...] = _setting(
        "KLEIN_BASE_LORAS",
        (),
        _loras,
        "LoRAs that are always on, merged before a request's: `PATH` or `PATH:SCALE`, separated by "
        "commas",
    )
    lora_cache: Path = _setting(
        "KLEIN_LORA_CACHE",
        Path("~/.cache/klein/loras"),
        Path,
        "folder of fetched LoRAs; may be a volume that workers share, or read-only",
    )
    lora_cache_gb: float = _setting(
        "KLEIN_LORA_CACHE_GB",
        20.0,
        _number(float, 0, 10000),
        "its size limit in GB, downloads under way included; the longest unused goes first",
    )
    civitai_token: Secret | None = _setting(
        "CIVITAI_TOKEN", None, Secret, "Civitai API key for LoRAs that need one"
    )
    fetch_hosts: frozenset[str] = _setting(
        "KLEIN_FETCH_HOSTS",
        frozenset(),
        _names,
        "hosts of your own network LoRAs may come from, such as `store.lan,10.0.0.5:9000`",
    )
    lora_uploads: bool = _setting(
        "KLEIN_LORA_UPLOADS", False, _switch, "`on` lets callers add and delete LoRAs over HTTP"
    )
    api_keys: Secret | None = _setting(
        "KLEIN_API_KEYS",
        None,
        Secret,
        "keys callers must show, `NAME:KEY` or `NAME:KEY:uploads`, separated by commas",
    )
    api_keys_file: Path | None = _setting(
        "KLEIN_API_KEYS_FILE", None, Path, "a file with such keys, one a line"
    )
    cors_origins: frozenset[str] = _setting(
        "KLEIN_CORS_ORIGINS",
        frozenset(),
        _names,
        "origins whose pages may call klein, such as `https://app.example`; `*` for all",
    )
    max_body_mb: float = _setting(
        "KLEIN_MAX_BODY_MB",
        PICTURES_MB * 4 // 3 + 2.0,  # in base64, and the rest of the JSON
        _number(float, 1, 1000),
        f"largest request body in MB on routes that take pictures, by default enough for "
        f"{PICTURES_MB} MB of them in base64; 1 MB elsewhere",
    )
    prompt_loras: bool = _setting(
        "KLEIN_PROMPT_LORAS", False, _switch, "`on` understands `<lora:name:0.8>` in prompts"
    )
    queue_size: int = _setting(
        "KLEIN_QUEUE_SIZE", 8, _number(int, 1, 1000), "jobs that may wait; more are refused at once"
    )
    jobs_per_key: int = _setting(
        "KLEIN_JOBS_PER_KEY",
        0,
        _number(int, 0, 1000),
        "jobs that one key may have under way; 0: half of `KLEIN_QUEUE_SIZE` where there are "
        "several keys, and no bound where there is one",
    )
    timeout: float = _setting(
        "KLEIN_TIMEOUT", 900.0, _number(float, 1, 86400), "seconds a job may take, waiting included"
    )
    max_response_mb: float = _setting(
        "KLEIN_MAX_RESPONSE_MB",
        10.0,
        _number(float, 0.1, 1000),
        "largest RunPod result in MB (RunPod drops larger ones)",
    )
    s3_endpoint: str | None = _setting(
        "KLEIN_S3_ENDPOINT", None, str, "S3 endpoint URL for `return_type: url`"
    )
    s3_bucket: str | None = _setting("KLEIN_S3_BUCKET", None, str, "bucket the pictures go to")
    s3_region: str = _setting(
        "KLEIN_S3_REGION",
        "auto",
        str,
        "the bucket's region, which signs its links: `eu-central-1` and the like on AWS",
    )
    s3_key_id: Secret | None = _setting("KLEIN_S3_KEY_ID", None, Secret, "access key id")
    s3_secret: Secret | None = _setting("KLEIN_S3_SECRET", None, Secret, "secret access key")
    s3_expiry: int = _setting(
        "KLEIN_S3_EXPIRY", 86400, _number(int, 60, 604800), "seconds a picture's URL stays valid"
    )
    ai_mark: bool = _setting(
        "KLEIN_AI_MARK",
        True,
        _switch,
        "every image says in IPTC's words that AI made it; `off` leaves that out",
    )
    metadata: Metadata = _setting(
        "KLEIN_METADATA",
        "full",
        _choice(*METADATA),
        "parameters inside images: `full` draws one again, `minimal` has no prompts, LoRAs or "
        "input images, `none` nothing",
    )
    c2pa_cert: Path | None = _setting(
        "KLEIN_C2PA_CERT",
        None,
        Path,
        "a PEM file, the certificate chain that C2PA manifests are signed with, its own one first",
    )
    c2pa_key: Path | None = _setting(
        "KLEIN_C2PA_KEY", None, Path, "a PEM file, the private key of the first certificate"
    )
    filter: str | None = _setting(
        "KLEIN_FILTER",
        None,
        _callable_name,
        "`package.module:name` of a function that may refuse or mark requests and images",
    )
    filter_seconds: float = _setting(
        "KLEIN_FILTER_SECONDS",
        30.0,
        _number(float, 0.1, 600),
        "seconds the filter may take for a request or an image; after that it is an error",
    )
    jobs_keep_seconds: float = _setting(
        "KLEIN_JOBS_KEEP_SECONDS",
        3600.0,
        _number(float, 1, 604800),
        "seconds a job over HTTP is kept after its end, with its images",
    )
    jobs_keep_mb: float = _setting(
        "KLEIN_JOBS_KEEP_MB",
        256.0,
        _number(float, 1, 100000),
        "MB of memory for the images of jobs; the oldest go first, the newest job's always stay",
    )
    event_streams: int = _setting(
        "KLEIN_EVENT_STREAMS", 32, _number(int, 1, 10000), "event streams one key may have open"
    )
    webhook_secret: Secret | None = _setting(
        "KLEIN_WEBHOOK_SECRET",
        None,
        Secret,
        "signs the webhooks of jobs: `whsec_` and base64 of 24 to 64 bytes; none are sent without",
    )

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> "Settings":
        """Read the table from `environ`.

        Raises BadSetting for an unknown `KLEIN_…` name or a value that cannot be used.
        """
        rows = {f.metadata["env"]: f for f in fields(cls)}
        for name in environ:
            if name.startswith("KLEIN_") and name not in rows:
                raise BadSetting(unknown("setting", name, sorted(rows)), field=name)
        values = {}
        for name, row in rows.items():
            text = environ.get(name, "").strip()
            if text:
                values[row.name] = _parse(name, row.metadata["parse"], text)
        return cls(**values)


def _parse(name: str, parse: Callable[[str], Any], text: str) -> Any:
    try:
        return parse(text)
    except ValueError as error:
        shown = "the value" if parse is Secret else repr(text)
        raise BadSetting(f"{name}: {shown} {_reason(error)}", field=name) from error


def _reason(error: ValueError) -> str:
    text = str(error)
    return text if text.startswith(("must", "is")) else f"is not a number ({text})"
