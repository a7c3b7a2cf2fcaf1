"""What a request names: a file below the LoRA folder, or a Hub repository."""

import re
from dataclasses import dataclass

from klein.errors import LoraError

_HUB = re.compile(r"^[\w.-]+/[\w.-]+$")


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """One LoRA of a request: where it is and how strongly it acts (1.0 is as trained)."""

    path: str
    scale: float = 1.0
    weight_name: str | None = None
    revision: str | None = None


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


def parse(spec: LoraSpec) -> LocalFile | HubFile:
    """Decide what `spec.path` names; raises LoraError for what is neither.

    `name.safetensors` (folders allowed) is a local file, `owner/repo` or `owner/repo@revision` a
    Hub repository.
    """
    path = spec.path.strip()
    if "://" in path:
        raise LoraError(f"LoRA {path!r}: URLs are not taken; name a Hub repository or a local file")
    if path.endswith(".safetensors"):
        return LocalFile(path)
    if path.endswith((".bin", ".pt", ".pth", ".ckpt")):
        raise LoraError(
            f"LoRA {path!r}: only .safetensors files are read, since pickle files can run code"
        )
    repo, _, revision = path.partition("@")
    if not _HUB.match(repo):
        raise LoraError(
            f"LoRA {path!r} is neither a .safetensors file nor a Hub repository (owner/name)"
        )
    if revision and spec.revision and revision != spec.revision:
        raise LoraError(f"LoRA {path!r} names another revision than its field {spec.revision!r}")
    return HubFile(repo, revision or spec.revision, spec.weight_name)
