"""Where a model's weights are: every place that may hold them, in order, and the download after.

A place counts only when all files of the model are in it: half a download is not a model.
"""

import json
import logging
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from klein.errors import ModelUnavailable
from klein.sources import hub
from klein.sources.hub import HubFailed, Problem

log = logging.getLogger(__name__)

PATTERNS = ("model_index.json", "*/*.json", "*/*.txt", "*/*.jinja")
"""What a pipeline is made of beside its weights, `PART/*.safetensors`. Not the single-file copies
that repositories keep beside it."""
WEIGHTED = ("transformer", "text_encoder", "vae")
BESIDE_TRANSFORMER = ("text_encoder", "vae")
LOG_EVERY = 10.0
"""Seconds between two lines about a download where there is no terminal for a bar."""


@dataclass(frozen=True, slots=True)
class Place:
    """A folder that may hold models: as a Hugging Face cache, or `plain`, by their names."""

    name: str
    folder: Path
    plain: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """A whole model. `revision` is its commit, None where the place does not say."""

    place: str
    folder: Path
    revision: str | None


VOLUME = "the network volume"
MOUNTED = (
    Place("RunPod's cached model", Path("/runpod-volume/huggingface-cache/hub")),
    Place(VOLUME, Path("/runpod-volume/models"), plain=True),
    Place(VOLUME, Path("/runpod-volume/huggingface/hub")),
    Place(VOLUME, Path("/workspace/models"), plain=True),
    Place(VOLUME, Path("/workspace/huggingface/hub")),
)
"""RunPod mounts a volume at the first root on Serverless and at the second on Pods."""


def places() -> tuple[Place, ...]:
    """Where to look, in order; the last is the cache that a download fills."""
    return (*MOUNTED, Place("the Hugging Face cache", hub.cache_folder()))


def find(
    repo: str,
    revision: str | None,
    where: tuple[Place, ...],
    weighted: tuple[str, ...] = WEIGHTED,
) -> Found | None:
    """The first place that holds the whole of `repo` at `revision`, or None; of weights those of
    the parts `weighted`."""
    for place in where:
        try:
            found = _plain(place, repo, revision) if place.plain else _cached(place, repo, revision)
        except OSError:  # not readable for this user is not there
            continue
        if found and is_whole(found.folder, weighted):
            return found
    return None


def is_whole(folder: Path, weighted: tuple[str, ...] = WEIGHTED) -> bool:
    """Whether every part that model_index.json names is there, and all weights of `weighted`."""
    try:
        index = json.loads((folder / "model_index.json").read_text())
        parts = [name for name, kind in index.items() if isinstance(kind, list) and kind[0]]
        return bool(parts) and all(_part_is_whole(folder / part, weighted) for part in parts)
    except (OSError, ValueError, AttributeError, KeyError, IndexError):
        return False


def _part_is_whole(part: Path, weighted: tuple[str, ...]) -> bool:
    if part.name not in weighted:
        return any(path.is_file() for path in part.iterdir())
    shards = [x.name for x in part.glob("*.safetensors") if "-of-" not in x.name]
    for listing in part.glob("*.safetensors.index.json"):
        shards = list(json.loads(listing.read_text())["weight_map"].values())
    has_all = all((part / shard).is_file() for shard in shards)
    return (part / "config.json").is_file() and bool(shards) and has_all


def _plain(place: Place, repo: str, revision: str | None) -> Found | None:
    """A folder of the model's name; it has no revisions, so one that is asked for is not there."""
    if revision is not None:
        return None
    owner, _, name = repo.rpartition("/")
    folder = _entry(place.folder, name)
    if folder is None and (parent := _entry(place.folder, owner)):
        folder = _entry(parent, name)
    return Found(place.name, folder, None) if folder else None


def _cached(place: Place, repo: str, revision: str | None) -> Found | None:
    """A snapshot in a Hugging Face cache: that of `revision`, else of main, else the newest."""
    model = _entry(place.folder, f"models--{repo.replace('/', '--')}")
    if model is None:
        return None
    ref = model / "refs" / (revision or "main")
    commit = ref.read_text().strip() if ref.is_file() else revision
    if commit:
        snapshot = model / "snapshots" / commit
        return Found(place.name, snapshot, commit) if snapshot.is_dir() else None
    newest = max((model / "snapshots").iterdir(), key=lambda path: path.stat().st_mtime)
    return Found(place.name, newest, newest.name)


def _entry(folder: Path, name: str) -> Path | None:
    """The folder `name` inside `folder`, whatever its case: RunPod's is not always the Hub's."""
    if not name or not folder.is_dir():
        return None
    exact = folder / name
    if exact.is_dir():
        return exact
    return next(
        (x for x in folder.iterdir() if x.name.lower() == name.lower() and x.is_dir()), None
    )


def download(
    repo: str, revision: str | None, token: str | None, weighted: tuple[str, ...] = WEIGHTED
) -> Found:
    """Fetch `repo` into the Hugging Face cache, going on where a former download stopped; of
    weights those of the parts `weighted`.

    Raises ModelUnavailable when it does not fit on the disk or does not come.
    """
    cache = hub.cache_folder()
    patterns = (*PATTERNS, *(f"{part}/*.safetensors" for part in weighted))
    try:
        missing = hub.missing_bytes(repo, revision, token, patterns)
        _require_room(cache, missing, repo)
        log.info("downloading %s: %s into %s", repo, _gb(missing), cache)
        with _logged(cache / f"models--{repo.replace('/', '--')}" / "blobs", missing):
            folder = hub.download(repo, revision, token, patterns)
    except HubFailed as error:
        raise ModelUnavailable(
            str(error)
            if error.problem is Problem.UNWRITABLE
            else f"{repo} could not be downloaded: it {error}; check the network and start klein "
            "again; it goes on where it stopped"
        ) from error
    return Found("the Hugging Face Hub", folder, folder.name)


def _require_room(cache: Path, needed: int, repo: str) -> None:
    free = shutil.disk_usage(cache).free
    if needed > free:
        raise ModelUnavailable(
            f"{repo} needs {_gb(needed)} more in {cache} and {_gb(free)} are free there: use a "
            "larger disk or volume, or on RunPod the endpoint's cached model"
        )


@contextmanager
def _logged(blobs: Path, total: int) -> Iterator[None]:
    """Log how far a download is; on a terminal the Hub's own bar says so."""
    if sys.stderr.isatty():
        yield
        return
    done = threading.Event()
    before = _size(blobs)

    def watch() -> None:
        while not done.wait(LOG_EVERY):
            here = min(_size(blobs) - before, total)
            log.info("%3d %%  %s of %s", 100 * here // max(total, 1), _gb(here), _gb(total))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _size(folder: Path) -> int:
    """Bytes that the files in `folder` really take: a download may set its file's length first."""
    total = 0
    for path in folder.glob("*"):
        try:
            total += path.stat().st_blocks * 512
        except OSError:  # renamed just now
            continue
    return total


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
