"""The Hugging Face Hub. Models come through its own client, single files through klein's fetcher.

Whatever goes wrong, and however the client says it, comes out as a HubFailed with its problem.
"""

import errno
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any
from urllib.parse import quote

from klein.sources.fetch import Fetcher, Offer, Refused
from klein.sources.reference import SUFFIX, BadReference, HubFile, is_weight_name
from klein.sources.transport import FetchFailed, Watch


class Problem(Enum):
    """What can be wrong with a question to the Hub; the value is a sentence without its subject."""

    GATED = "is gated: accept its terms on the Hub and set HF_TOKEN"
    NO_REPOSITORY = "is not on the Hub, or private: check the name, set HF_TOKEN"
    NO_REVISION = "has no such revision"
    NO_FILE = "has no such file"
    UNWRITABLE = "cannot be stored"
    UNREACHABLE = "is not in the cache and could not be fetched from the Hub"


class HubFailed(FetchFailed):
    """A question to the Hub that was not answered; the message follows the repository's name."""

    def __init__(self, problem: Problem, message: str = "", *, retryable: bool = False) -> None:
        super().__init__(message or problem.value, retryable=retryable)
        self.problem = problem


_CODES = {
    "GatedRepo": Problem.GATED,
    "RepoNotFound": Problem.NO_REPOSITORY,
    "RevisionNotFound": Problem.NO_REVISION,
    "EntryNotFound": Problem.NO_FILE,
}
"""The Hub's own codes, in the header `x-error-code`."""


def failure(error: Exception) -> HubFailed:
    """What the Hub's client raised, as one of klein's own."""
    from huggingface_hub import errors

    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return HubFailed(Problem.UNWRITABLE, unwritable())
    for kind, problem in (
        (errors.GatedRepoError, Problem.GATED),
        (errors.RepositoryNotFoundError, Problem.NO_REPOSITORY),
        (errors.RevisionNotFoundError, Problem.NO_REVISION),
        (errors.LocalEntryNotFoundError, Problem.UNREACHABLE),
        (errors.EntryNotFoundError, Problem.NO_FILE),
    ):
        if isinstance(error, kind):
            return HubFailed(problem, retryable=problem is Problem.UNREACHABLE)
    # whatever else: the client has changed its HTTP library, and with it its errors, before
    sentence = f"{Problem.UNREACHABLE.value} ({type(error).__name__})"
    return HubFailed(Problem.UNREACHABLE, sentence, retryable=True)


def unwritable() -> str:
    """What to do about a Hugging Face cache that cannot be written."""
    return (
        f"{cache_folder()} cannot be written: mount a volume there that user {os.getuid()} "
        "can write, or set HF_HOME to a folder it can"
    )


def cache_folder() -> Path:
    """The Hugging Face cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


# -- models, through the Hub's client ----------------------------------------------------------


def read_json(repo: str, name: str, revision: str | None, token: str | None) -> dict[str, object]:
    """A small JSON file of a repository, through the cache; raises HubFailed."""
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(repo, name, revision=revision, token=token)
        return dict(json.loads(Path(path).read_text()))
    except Exception as error:
        raise failure(error) from error


def missing_bytes(
    repo: str, revision: str | None, token: str | None, patterns: Sequence[str]
) -> int:
    """What is still to be downloaded of the files that fit `patterns`; raises HubFailed."""
    from huggingface_hub import snapshot_download

    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        files = snapshot_download(
            repo, revision=revision, token=token, allow_patterns=[*patterns], dry_run=True
        )
        return sum(file.file_size or 0 for file in files if file.will_download)
    except Exception as error:
        raise failure(error) from error


def download(repo: str, revision: str | None, token: str | None, patterns: Sequence[str]) -> Path:
    """The folder of a snapshot whose files fit `patterns`, going on where a former download
    stopped; raises HubFailed."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(repo, revision=revision, token=token, allow_patterns=[*patterns])
        return Path(folder)
    except Exception as error:
        raise failure(error) from error


# -- single files, through klein's fetcher -----------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hub:
    """Finds single files. `endpoint` None is the Hub's own, or what HF_ENDPOINT says."""

    fetcher: Fetcher
    token: str | None = None
    endpoint: str | None = None

    def offer(self, file: HubFile, watch: Watch) -> tuple[HubFile, Offer]:
        """The file as of its commit, and where it is; raises HubFailed."""
        info = self._json(
            f"/api/models/{file.repo}/revision/{quote(file.revision or 'main', safe='')}"
            "?blobs=true",
            watch,
        )
        try:
            rows = {str(row["rfilename"]): row for row in info.get("siblings") or ()}
            name = file.weight_name or _only(rows)
            commit, row = str(info["sha"]), rows.get(name)
            if not is_weight_name(name):
                raise BadReference("the Hub's own name for it")
            if row is None:
                raise HubFailed(Problem.NO_FILE, f"has no file {name!r}")
            lfs = row.get("lfs") or {}
            sha256, size = lfs.get("sha256"), lfs.get("size", row.get("size"))
        except (KeyError, TypeError, AttributeError, BadReference) as error:
            raise HubFailed(
                Problem.UNREACHABLE, "cannot be used: the Hub's answer was not understood"
            ) from error
        fixed = HubFile(file.repo, commit, name)
        url = f"{self._endpoint}/{file.repo}/resolve/{quote(commit, safe='')}/{quote(name)}"
        return fixed, Offer(url, self._headers, sha256, size if type(size) is int else None)

    def cached(self, file: HubFile) -> Path | None:
        """The file in the Hugging Face cache, where somebody else has put it there."""
        from huggingface_hub import try_to_load_from_cache

        if file.weight_name is None:
            return None
        found = try_to_load_from_cache(file.repo, file.weight_name, revision=file.revision)
        return Path(found) if isinstance(found, str) else None

    def explain(self, error: FetchFailed, file: HubFile) -> HubFailed:
        """A failed fetch as what it means on the Hub."""
        if isinstance(error, HubFailed):
            return error
        if not isinstance(error, Refused) or error.reason not in _CODES:
            return HubFailed(
                Problem.UNREACHABLE,
                f"could not be fetched from the Hub: {error}",
                retryable=error.retryable,
            )
        problem = _CODES[error.reason]
        if problem is Problem.NO_REVISION:
            return HubFailed(problem, f"has no revision {file.revision!r}")
        return HubFailed(problem)

    @property
    def is_offline(self) -> bool:
        """Whether HF_HUB_OFFLINE says that the Hub is not to be asked."""
        from huggingface_hub import constants

        return self.endpoint is None and bool(constants.HF_HUB_OFFLINE)

    @property
    def _endpoint(self) -> str:
        from huggingface_hub import constants

        return (self.endpoint or constants.ENDPOINT).rstrip("/")

    @property
    def _headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.token}"} if self.token else {}

    def _json(self, path: str, watch: Watch) -> dict[str, Any]:
        if self.is_offline:
            raise HubFailed(Problem.UNREACHABLE, "is not in the cache, and HF_HUB_OFFLINE is set")
        info = self.fetcher.json(f"{self._endpoint}{path}", self._headers, watch)
        return info if isinstance(info, dict) else {}


def _only(names: dict[str, Any]) -> str:
    weights = [name for name in names if name.endswith(SUFFIX)]
    if len(weights) != 1:
        found = ", ".join(name[:100] for name in weights[:20]) or "none"
        raise HubFailed(
            Problem.NO_FILE, f"name one of its .safetensors files as weight_name ({found})"
        )
    return weights[0]
