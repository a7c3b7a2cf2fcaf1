"""What a request names: a file in the LoRA folder, a Hub repository, an address, Civitai."""

import re
from dataclasses import dataclass
from urllib.parse import parse_qs, urlsplit

from klein.errors import LoraError

_HUB = re.compile(r"^[\w.-]+/[\w.-]+$")
_CIVITAI = re.compile(r"^civitai:(\d+)$")
_CIVITAI_HOSTS = ("civitai.com", "www.civitai.com", "civitai.green", "civitai.red")


@dataclass(frozen=True, slots=True)
class LocalFile:
    """`name` is relative to the LoRA folder."""

    name: str


@dataclass(frozen=True, slots=True)
class HubFile:
    """`weight_name` None means the repository's only `.safetensors` file."""

    repo: str
    revision: str | None
    weight_name: str | None


@dataclass(frozen=True, slots=True)
class UrlFile:
    """An https address; `sha256` is what its content must have, if its `#sha256=` says so."""

    url: str
    sha256: str | None


@dataclass(frozen=True, slots=True)
class CivitaiFile:
    """A model version on Civitai."""

    version: int


Reference = LocalFile | HubFile | UrlFile | CivitaiFile


def parse(path: str, weight_name: str | None = None, revision: str | None = None) -> Reference:
    """Decide what `path` names; raises LoraError for what is nothing of these.

    `name.safetensors` is a local file, `owner/repo` or `owner/repo@revision` a Hub repository,
    `https://…` an address, `civitai:VERSION` or the address of a Civitai page that version.
    """
    path = path.strip()
    if hit := _CIVITAI.match(path):
        return CivitaiFile(int(hit[1]))
    if "://" in path:
        return _address(path)
    if path.endswith(".safetensors"):
        return LocalFile(path)
    if path.endswith((".bin", ".pt", ".pth", ".ckpt")):
        raise LoraError(
            f"LoRA {path!r}: only .safetensors files are read, since pickle files can run code"
        )
    repo, _, at = path.partition("@")
    if not _HUB.match(repo):
        raise LoraError(
            f"LoRA {path!r} is no .safetensors file, Hub repository (owner/name), https address "
            "or civitai:VERSION"
        )
    if at and revision and at != revision:
        raise LoraError(f"LoRA {path!r} names another revision than its field {revision!r}")
    return HubFile(repo, at or revision, weight_name)


def redacted(path: str) -> str:
    """A reference as it may be seen by others: an address without what can hold a token."""
    if "://" not in path:
        return path
    parts = urlsplit(path)
    return f"{parts.scheme}://{parts.hostname}{parts.path}"


def _address(path: str) -> UrlFile | CivitaiFile:
    url, _, fragment = path.partition("#")
    parts = urlsplit(url)
    if parts.hostname in _CIVITAI_HOSTS:
        version = parse_qs(parts.query).get("modelVersionId", [""])[0]
        if parts.path.startswith("/api/download/models/"):
            version = parts.path.rsplit("/", 1)[-1]
        if not version.isdigit():
            raise LoraError(
                f"LoRA {redacted(path)!r} names a model with several versions: take the address "
                "with ?modelVersionId=…, or civitai:VERSION"
            )
        return CivitaiFile(int(version))
    sha256 = fragment.removeprefix("sha256=") if fragment.startswith("sha256=") else None
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise LoraError(f"LoRA {redacted(path)!r}: #sha256= must be 64 hexadecimal digits")
    return UrlFile(url, sha256.lower() if sha256 else None)
