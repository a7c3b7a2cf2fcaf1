"""The file that KLEIN_TRANSFORMER names: a path, or one on the Hub, at an address or on Civitai.

Its header is enough to plan with, and is all that is read of a file elsewhere before klein starts
to load. Then it is fetched as LoRAs are, into a cache of its own.
"""

import hashlib
import logging
import re
import time
from dataclasses import replace
from pathlib import Path

from klein.errors import KleinError, ModelUnavailable
from klein.models import checkpoint
from klein.models.catalog import GB
from klein.models.checkpoint import FIELD, KNOWN_FILES, Checkpoint
from klein.settings import Settings
from klein.sources import reference
from klein.sources.address import redacted
from klein.sources.cache import Store
from klein.sources.civitai import Civitai
from klein.sources.fetch import Fetcher
from klein.sources.files import RemoteFiles
from klein.sources.hub import Hub
from klein.sources.reference import SUFFIX, BadReference, RemoteFile
from klein.sources.safetensors import Damaged
from klein.sources.transport import FetchFailed, Watch

log = logging.getLogger(__name__)

MAX_BYTES = 80 * GB
MAX_SECONDS = 12 * 3600.0
ATTEMPTS = 5
"""To fetch a file; each goes on where the last one stopped, after 1, 2, 4 and 8 seconds."""
LOG_EVERY = 10.0
_ON_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+):(?P<file>[^@:]+\.safetensors)(@(?P<revision>.+))?")
_SHA256 = re.compile(r"([0-9a-f]{64})(\.safetensors)?")


def find(settings: Settings) -> Checkpoint | None:
    """What KLEIN_TRANSFORMER names, told from its header; None where it is not set. Raises
    ModelUnavailable."""
    if settings.transformer is None:
        return None
    name = redacted(settings.transformer)
    ref = _parsed(settings.transformer)
    if isinstance(ref, Path):
        return _at(ref, ref.name)
    remote = _remote(settings)
    try:
        if path := remote.at_hand(ref):
            return _at(path, name)
        header, offer = remote.header(ref)
        found = checkpoint.recognise(header.entries, name, checkpoint.metadata_formats(header))
    except (FetchFailed, Damaged, OSError) as error:
        raise _failed(name, error) from error
    return replace(found, sha256=offer.sha256)


def fetch(settings: Settings, found: Checkpoint) -> Checkpoint:
    """`found` with its file on disk: fetched, if it was elsewhere. Raises ModelUnavailable."""
    ref = _parsed(settings.transformer or "")
    if found.files or isinstance(ref, Path):
        return found
    remote, progress = _remote(settings), _Progress(found.name)
    for attempt in range(ATTEMPTS):
        try:
            watch = Watch(on_bytes=progress)
            path = remote.get(ref, found.name, lambda part: _unusable(part, found.name), watch)
            return _at(path, found.name)
        except (FetchFailed, OSError) as error:
            if attempt == ATTEMPTS - 1 or not getattr(error, "retryable", False):
                raise _failed(found.name, error) from error
            log.warning("%s: %s; going on in %d s", found.name, error, 2**attempt)
            time.sleep(2**attempt)
    raise AssertionError


def _parsed(text: str) -> Path | RemoteFile:
    """A path, or what is elsewhere."""
    text = text.strip()
    if text.lower().endswith(".gguf"):
        raise ModelUnavailable(
            f"{FIELD}: {redacted(text)} is in GGUF, which klein does not read: "
            f"{checkpoint.USE_INSTEAD}",
            field=FIELD,
        )
    try:
        if hit := _ON_HUB.fullmatch(text):
            ref = reference.parse(hit["repo"], hit["file"], hit["revision"])
        elif text.endswith(SUFFIX) and "://" not in text:
            return Path(text).expanduser()
        else:
            ref = reference.parse(text)
    except BadReference as error:
        raise ModelUnavailable(
            f"{FIELD}: {redacted(text)[:200]!r}: {error}", field=FIELD
        ) from error
    if isinstance(ref, reference.LocalFile):
        return Path(ref.name)
    if isinstance(ref, reference.HubFile) and ref.weight_name is None:
        raise ModelUnavailable(
            f"{FIELD}: name the file too, as {ref.repo}:NAME.safetensors", field=FIELD
        )
    return ref


def _remote(settings: Settings) -> RemoteFiles:
    store = Store(
        settings.transformer_cache.expanduser(),
        settings.transformer_cache_gb * GB,
        grace=settings.timeout,
        setting="KLEIN_TRANSFORMER_CACHE_GB",
    )
    fetcher = Fetcher(settings.fetch_hosts, MAX_BYTES, MAX_SECONDS)
    token = settings.hf_token.value if settings.hf_token else None
    key = settings.civitai_token.value if settings.civitai_token else None
    return RemoteFiles(store, fetcher, Hub(fetcher, token), Civitai(fetcher, key))


def _at(path: Path, name: str) -> Checkpoint:
    found = checkpoint.inspect([path], name)
    return replace(found, sha256=_sha256(path))


def _sha256(path: Path) -> str | None:
    """The sha256 of a file whose size is that of a known one, or whose name says it."""
    if hit := _SHA256.fullmatch(path.resolve().name):
        return hit[1]
    if path.stat().st_size not in {size for _, size in KNOWN_FILES.values()}:
        return None
    log.info("reading %s once, to tell by its sha256 which model it is", path.name)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unusable(part: Path, name: str) -> str | None:
    """Why what was fetched is no transformer that klein can use, or None."""
    try:
        checkpoint.inspect([part], name)
    except KleinError as error:
        return str(error)
    return None


def _failed(name: str, error: Exception) -> ModelUnavailable:
    text = str(error)
    return ModelUnavailable(
        text if text.startswith(FIELD) else f"{FIELD}: {name}: {text}", field=FIELD
    )


class _Progress:
    """Logs how far a download is, now and then."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._logged = 0.0

    def __call__(self, have: int, total: int | None) -> None:
        now = time.monotonic()
        if now - self._logged < LOG_EVERY and have != total:
            return
        self._logged = now
        of = f" of {total / GB:.1f}" if total else ""
        log.info("%s: %.1f%s GB fetched", self._name, have / GB, of)
