"""The LoRAs of a deployment: finds what a reference names, lists, adds and removes."""

import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from klein.errors import KleinError, LoraError, LoraUnavailable
from klein.lora import file
from klein.lora.file import Identity, LoraFile
from klein.lora.folder import LoraFolder, shown
from klein.lora.metadata import defaults
from klein.lora.spec import LoraSpec
from klein.settings import Secret
from klein.sources import reference
from klein.sources.address import redacted
from klein.sources.cache import Store, StoreStats
from klein.sources.civitai import CIVITAI, Civitai
from klein.sources.fetch import Fetcher
from klein.sources.files import RemoteFiles, Unwanted
from klein.sources.hub import Hub
from klein.sources.reference import BadReference, CivitaiFile, LocalFile, RemoteFile, UrlFile
from klein.sources.transport import FetchFailed, OnBytes, Watch, go_on, ignore_bytes

log = logging.getLogger(__name__)

REMEMBERED = 64
"""Inspected files kept in memory, about 1 MB each."""
LISTED = 10_000
"""Rows of the list kept in memory, about 1 KB each."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Keys to what is not public."""

    hugging_face: Secret | None = None
    civitai: Secret | None = None


class LoraLibrary:
    """Where LoRAs come from: a folder, the Hub, addresses and Civitai."""

    def __init__(
        self,
        folder: Path | None,
        store: Store | None = None,
        fetcher: Fetcher | None = None,
        tokens: Tokens | None = None,
        civitai: str = CIVITAI,
        hub: str | None = None,
    ) -> None:
        """Without a `store` nothing is fetched. `hub` None is the Hub, or what HF_ENDPOINT says."""
        self.folder = LoraFolder(folder)
        self._remote = _remote(store, fetcher or Fetcher(), tokens or Tokens(), civitai, hub)

    def find(
        self,
        spec: LoraSpec,
        on_bytes: OnBytes = ignore_bytes,
        *,
        deadline: float = float("inf"),
        check: Callable[[], None] = go_on,
    ) -> LoraFile:
        """The file `spec` names, fetched if need be.

        `deadline` is on the clock of time.monotonic; `check` is called a few times a second and
        raises to stop, `on_bytes` with what has arrived. Raises LoraError, naming the way out, and
        LoraUnavailable where the network or the disk is in the way.
        """
        name = redacted(spec.path)
        try:
            ref = _parsed(spec)
            if isinstance(ref, LocalFile):
                return _known(self.folder.path(ref.name), name)
            return self._fetched(ref, name, Watch(deadline, check, on_bytes))
        except KleinError:
            raise
        except Exception as error:  # whatever a strange file does, it does it to its LoRA alone
            log.exception("LoRA %s", name)
            raise LoraError(
                f"LoRA {name!r} could not be read, by a fault of klein ({type(error).__name__})"
            ) from error

    def is_local(self, spec: LoraSpec) -> bool:
        """Whether `find` would answer, or refuse, without asking anybody. Cheap; never raises."""
        try:
            ref = _parsed(spec)
            if isinstance(ref, LocalFile) or self._remote is None:
                return True
            return self._remote.at_hand(ref) is not None
        except (LoraError, OSError):
            return True

    def entries(self) -> list[dict[str, Any]]:
        """Every LoRA at hand, local ones first; a file that cannot be used says why."""
        local = [(name, "folder", partial(self.folder.path, name)) for name in self.names()]
        stored = self._remote.store.names() if self._remote else ()
        fetched = [(name, "fetched", partial(Path, path)) for name, path in stored]
        return [_row(*line) for line in (*local, *fetched)]

    def store_stats(self) -> StoreStats | None:
        """What the store of fetched files did so far, if there is one."""
        return self._remote.store.stats() if self._remote else None

    def names(self) -> list[str]:
        """The local LoRAs a request can name."""
        return self.folder.names()

    def add(self, name: str, chunks: Iterable[bytes]) -> dict[str, Any]:
        """Write an uploaded file into the folder under `name`; refused if it is no usable LoRA."""
        path = self.folder.add(name, chunks)
        return _row(name, "folder", partial(Path, path))

    def add_reference(
        self, spec: LoraSpec, name: str | None, on_bytes: OnBytes = ignore_bytes
    ) -> dict[str, Any]:
        """Copy what `spec` names into the folder, as `name` or under its own."""
        found = self.find(spec, on_bytes)
        own = re.sub(r"[^\w.+-]+", "-", Path(found.name).name).strip("-")
        name = name or (own if own.endswith(".safetensors") else f"{own}.safetensors")
        with found.path.open("rb") as source:
            return self.add(name, iter(partial(source.read, 1 << 20), b""))

    def remove(self, name: str) -> None:
        """Delete a local LoRA and its defaults; raises LoraError if there is none."""
        self.folder.remove(name)

    def _fetched(self, ref: RemoteFile, name: str, watch: Watch) -> LoraFile:
        if self._remote is None:
            raise LoraError(f"LoRA {name!r}: this klein fetches no LoRAs")
        try:
            path = self._remote.get(ref, name, lambda part: _unusable(part, name), watch)
            found = _known(path, name)
        except FetchFailed as error:
            raise _explained(error, ref, name) from error
        except OSError as error:
            raise LoraUnavailable(f"LoRA {name!r} cannot be stored ({error.strerror})") from error
        promised = {ref.sha256} if isinstance(ref, UrlFile) else set()
        if re.fullmatch(r"[0-9a-f]{64}\.safetensors", path.name):
            promised.add(path.stem)
        if promised - {None, found.sha256}:
            self._remote.store.drop(path)
            raise LoraUnavailable(
                f"LoRA {name!r} was damaged on the disk and is thrown away: try again"
            )
        return found


def _remote(
    store: Store | None, fetcher: Fetcher, tokens: Tokens, civitai: str, hub: str | None
) -> RemoteFiles | None:
    if store is None:
        return None
    hugging_face = tokens.hugging_face.value if tokens.hugging_face else None
    key = tokens.civitai.value if tokens.civitai else None
    return RemoteFiles(
        store, fetcher, Hub(fetcher, hugging_face, hub), Civitai(fetcher, key, civitai)
    )


def _parsed(spec: LoraSpec) -> reference.Reference:
    try:
        return reference.parse(spec.path, spec.weight_name, spec.revision)
    except BadReference as error:
        raise LoraError(f"LoRA {redacted(spec.path)[:200]!r}: {error}") from error


def _unusable(part: Path, name: str) -> str | None:
    """Why what was fetched is no LoRA that klein can use, or None."""
    try:
        file.inspect(part, name)
    except LoraError as error:
        return str(error)
    return None


def _explained(error: FetchFailed, ref: RemoteFile, name: str) -> LoraError:
    if isinstance(error, Unwanted):
        return LoraError(str(error))
    hint = "; private files need CIVITAI_TOKEN" if isinstance(ref, CivitaiFile) else ""
    kind = LoraUnavailable if error.retryable else LoraError
    return kind(f"LoRA {name!r}: {error}{hint}")


def _known(path: Path, name: str) -> LoraFile:
    """What is at `path`, as it is now, under the name it was asked for by."""
    try:
        identity = Identity.of(path.stat())
    except OSError as error:
        raise LoraUnavailable(f"LoRA {name!r} cannot be read ({error.strerror})") from error
    found = _inspect(path, name, identity, identity.is_settled)
    return replace(found, defaults=defaults(path))


@lru_cache(maxsize=REMEMBERED)
def _inspect(path: Path, name: str, _: Identity, settled: bool) -> LoraFile:
    """Headers and hashes are read once for each state of a file, and again once it is settled."""
    return file.inspect(path, name)


def _row(name: str, source: str, find: Callable[[], Path]) -> dict[str, Any]:
    """One line of the list; whatever is wrong with a file is said in it."""
    row: dict[str, Any] = {"name": shown(name), "source": source, "bytes": 0}
    try:
        path = find()
        identity = Identity.of(path.stat())
        row["bytes"] = identity.size
        return row | _described(path, name, identity) | {"defaults": asdict(defaults(path))}
    except LoraError as error:
        return row | {"error": str(error)}
    except OSError as error:
        return row | {"error": f"LoRA {name!r} cannot be read ({error.strerror})"}


@lru_cache(maxsize=LISTED)
def _described(path: Path, name: str, _: Identity) -> dict[str, Any]:
    try:
        return describe(file.inspect(path, name))
    except LoraUnavailable:
        raise
    except LoraError as error:
        return {"error": str(error)}


def describe(found: LoraFile) -> dict[str, Any]:
    """What is known of a file, for people and for JSON."""
    return {
        "sha256": found.sha256,
        "format": found.format,
        "base": found.base,
        "rank": found.rank,
        "layers": len(found.patches),
        "left_out": found.left_out,
        "trigger_words": list(found.trigger_words),
        "defaults": asdict(found.defaults),
        "training": dict(found.training),
    }
