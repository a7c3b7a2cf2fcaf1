"""What a request names: a file in a folder, one in a Hub repository, an address, Civitai."""

import re
from dataclasses import dataclass
from urllib.parse import parse_qs, urlsplit

from klein.sources.address import Address, BadAddress

SUFFIX = ".safetensors"
MAX_PATH = 1000
MAX_NAME_BYTES = 255
"""Of one part of a path; file systems take no longer ones."""
_HUB_NAME = r"\w(?:[\w.-]{0,94}\w)?"
_HUB = re.compile(rf"(?!.*(?:--|\.\.)){_HUB_NAME}/{_HUB_NAME}(?<!\.git)", re.ASCII)
"""As the Hub names its repositories; its client raises for others."""
_REVISION = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)
_CIVITAI = re.compile(r"civitai:([1-9]\d{0,11})", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
CIVITAI_HOSTS = frozenset({"civitai.com", "www.civitai.com", "civitai.green", "civitai.red"})


class BadReference(ValueError):
    """Why a text names no file, in words that follow a colon."""


@dataclass(frozen=True, slots=True)
class LocalFile:
    """`name` is relative to a folder."""

    name: str


@dataclass(frozen=True, slots=True)
class HubFile:
    """`weight_name` None means the repository's only `.safetensors` file."""

    repo: str
    revision: str | None
    weight_name: str | None

    @property
    def is_fixed(self) -> bool:
        """Whether it is a commit, whose files never change."""
        return self.revision is not None and bool(_COMMIT.fullmatch(self.revision))

    @property
    def key(self) -> str:
        """What tells it from every other reference."""
        return f"hub:{self.repo}@{self.revision or 'main'}:{self.weight_name or ''}"


@dataclass(frozen=True, slots=True)
class UrlFile:
    """An https address; `sha256` is what its content must have, if its `#sha256=` says so."""

    url: str
    sha256: str | None

    @property
    def key(self) -> str:
        """What tells it from every other reference."""
        return self.url


@dataclass(frozen=True, slots=True)
class CivitaiFile:
    """A model version on Civitai."""

    version: int

    @property
    def key(self) -> str:
        """What tells it from every other reference."""
        return f"civitai:{self.version}"


RemoteFile = HubFile | UrlFile | CivitaiFile
Reference = LocalFile | RemoteFile


def parse(path: str, weight_name: str | None = None, revision: str | None = None) -> Reference:
    """Decide what `path` names; raises BadReference for what is nothing of these.

    `name.safetensors` is a local file, `owner/repo` or `owner/repo@revision` a Hub repository,
    `https://…` an address, `civitai:VERSION` or the address of a Civitai page that version.
    """
    path = path.strip()
    if hit := _CIVITAI.fullmatch(path):
        return CivitaiFile(int(hit[1]))
    if "://" in path:
        return _address(path)
    if path.endswith(SUFFIX):
        return LocalFile(_file_name(path))
    if path.endswith((".bin", ".pt", ".pth", ".ckpt")):
        raise BadReference("only .safetensors files are read, since pickle files can run code")
    return _hub(path, weight_name, revision)


def _hub(path: str, weight_name: str | None, revision: str | None) -> HubFile:
    repo, _, at = path.partition("@")
    if not _HUB.fullmatch(repo):
        raise BadReference(
            "it is no .safetensors file, Hub repository (owner/name), https address "
            "or civitai:VERSION"
        )
    if at and revision and at != revision:
        raise BadReference(f"it names another revision than its field {revision[:80]!r}")
    chosen = at or revision
    if chosen is not None and not (len(chosen) <= 200 and _REVISION.fullmatch(chosen)):
        raise BadReference(f"{chosen[:80]!r} is no commit, tag or branch")
    if weight_name is not None and not is_weight_name(weight_name):
        raise BadReference(f"weight_name {weight_name[:80]!r} is no .safetensors file of it")
    return HubFile(repo, chosen, weight_name)


def is_weight_name(name: str) -> bool:
    """Whether `name` can be a file of a repository that is read; raises BadReference for what no
    file can be called."""
    inside = not {"", ".", ".."} & set(name.split("/"))
    return inside and _file_name(name).endswith(SUFFIX)


def _file_name(name: str) -> str:
    """`name`, if a file can be called that."""
    if (
        not name.isprintable()
        or len(name) > MAX_PATH
        or any(len(part.encode()) > MAX_NAME_BYTES for part in name.split("/"))
    ):
        raise BadReference("its name is too long, or has characters that no file name has")
    return name


def _address(path: str) -> UrlFile | CivitaiFile:
    text, _, fragment = path.partition("#")
    try:
        address = Address.parse(text)
    except BadAddress as error:
        raise BadReference(str(error)) from error
    if address.host in CIVITAI_HOSTS:
        return _civitai(address)
    sha256 = fragment.removeprefix("sha256=") if fragment.startswith("sha256=") else None
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise BadReference("#sha256= must be 64 hexadecimal digits")
    return UrlFile(str(address), sha256.lower() if sha256 else None)


def _civitai(address: Address) -> CivitaiFile:
    parts = urlsplit(address.target)
    version = parse_qs(parts.query).get("modelVersionId", [""])[0]
    if parts.path.startswith("/api/download/models/"):
        version = parts.path.rsplit("/", 1)[-1]
    hit = _CIVITAI.fullmatch(f"civitai:{version}")
    if hit is None:
        raise BadReference(
            "it names a model with several versions: take the address with ?modelVersionId=…, "
            "or civitai:VERSION"
        )
    return CivitaiFile(int(hit[1]))
