"""Fetched files on disk, by content, the least recently used thrown away first.

    refs/<hash of the reference>.json   which content a reference led to, and when it did so last
    files/<sha256>.safetensors          the content, never touched again: its times prove that
    files/<sha256>.used                 its time is that of the last use
    partial/<hash of the reference>.<store>.part   a download under way, or interrupted

Everything appears by renaming, so workers can share the folder on a network volume. All of it
counts against one limit, in bytes and in number. A file that was used within `grace` seconds, which
no job outlives, is never thrown away.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from klein.sources.fetch import Reserve, forget
from klein.sources.transport import UNWATCHED, FetchFailed, Watch

log = logging.getLogger(__name__)

ABANDONED = 120.0
"""Seconds without a byte after which a download is nobody's: its reader gave up after 30."""
FORGOTTEN = 86400.0
"""Seconds after which nobody goes on with an interrupted download."""
HEADROOM = 64 * 1024**2
"""Bytes of a disk that are left free."""
MAX_FILES = 4096
"""Files, and references to them, however small they are: each is looked at before every fetch."""
USED = ".used"
_SHA256 = re.compile(r"[0-9a-f]{64}")

Fetch = Callable[[Path, Reserve], str | None]
"""Writes a file to the path, after it has reserved the bytes that it will have; returns the
sha256 that it is promised to have, if it is told one."""


@dataclass(frozen=True, slots=True)
class Known:
    """What a reference led to: the file, the name to show for it, and when it was asked last
    (seconds since 1970)."""

    path: Path
    name: str
    asked: float


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Files that were here when they were asked for, those that were fetched, and bytes kept."""

    hits: int
    fetches: int
    bytes: int


@dataclass(slots=True)
class _Flight:
    """A download that several may wait for."""

    done: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None


def age(stamp: float) -> float:
    """Seconds since a time that a file system tells (seconds since 1970), and until it if it has
    not come: a clock that was set back makes nothing young for as long."""
    return abs(time.time() - stamp)


def disk_free(folder: Path) -> int:
    """Free bytes of the disk that `folder` is on."""
    return shutil.disk_usage(folder).free


class Store:
    """A folder of fetched files of at most `max_bytes`, where it can be written."""

    def __init__(
        self,
        folder: Path,
        max_bytes: float,
        grace: float,
        free: Callable[[Path], int] = disk_free,
        setting: str = "KLEIN_LORA_CACHE_GB",
    ) -> None:
        """`setting` is the one that `max_bytes` comes from."""
        self._places = [folder]
        if not _writable(folder):
            temporary = _temporary()
            log.warning("%s cannot be written: fetched files are kept in %s", folder, temporary)
            self._places.insert(0, temporary)
        self._max_bytes = max_bytes
        self._grace = grace
        self._free = free
        self._setting = setting
        self._own = uuid.uuid4().hex[:12]
        self._lock = threading.Lock()
        self._flights: dict[str, _Flight] = {}
        self._reserved: dict[Path, int] = {}
        self._hits = self._fetches = 0
        self._drop_forgotten()
        self._bytes = self._measure()

    def stats(self) -> StoreStats:
        """Counts since the start; the bytes as they were after the last fetch."""
        return StoreStats(self._hits, self._fetches, self._bytes)

    def count_hit(self) -> None:
        """Note that a file did not need to be fetched."""
        with self._lock:
            self._hits += 1

    def find(self, ref: str, sha256: str | None = None) -> Known | None:
        """What `ref` leads to, if it is here: the content `sha256`, where that is promised."""
        for place in self._places:
            known = _read_ref(place, ref)
            if sha256 is not None:
                path = place / "files" / f"{sha256}.safetensors"
                known = Known(path, known.name if known else "", 0.0) if path.is_file() else None
            if known is not None:
                _touch(known.path)
                return known
        return None

    def get(
        self,
        ref: str,
        fetch: Fetch,
        *,
        name: str,
        sha256: str | None = None,
        watch: Watch = UNWATCHED,
    ) -> Path:
        """The file that `ref` leads to, fetched if it is not there yet.

        Of several who want the same at once one fetches and the others wait for its file, or its
        error, each as long as its own `watch` lets it. What has another sha256 than promised is
        not kept. Raises FetchFailed, and what `fetch` and `watch` raise.
        """

        def bring() -> Path:
            if found := self.find(ref, sha256):
                return found.path
            return self._bring(ref, fetch, name, sha256)

        while True:
            with self._lock:
                flight = self._flights.get(ref)
                leads = flight is None
                if flight is None:
                    flight = self._flights[ref] = _Flight()
            if leads:
                return self._lead(ref, flight, bring, watch)
            watch.wait(flight.done, "another download of the same file")
            if flight.error is not None:
                raise flight.error

    def link(self, ref: str, path: Path, name: str) -> None:
        """Note that `ref` leads, as of now, to a file of this store."""
        place = path.parent.parent
        with suppress(OSError):  # a read-only volume
            self._refer(place, ref, path.stem, name)

    def drop(self, path: Path) -> None:
        """Delete a file, and what is noted of it."""
        with suppress(OSError):
            forget(path)
            path.with_suffix(USED).unlink(missing_ok=True)

    def names(self) -> list[tuple[str, Path]]:
        """Every reference with a file, by the name to show for it."""
        known = {}
        for place in reversed(self._places):
            for entry in (place / "refs").glob("*.json"):
                if found := _read_entry(place, entry):
                    known[entry.stem] = (found.name, found.path)
        return sorted(known.values())

    # -- one download --------------------------------------------------------------------------

    def _lead(self, ref: str, flight: _Flight, bring: Callable[[], Path], watch: Watch) -> Path:
        try:
            return bring()
        except (FetchFailed, OSError) as error:
            if not watch.is_over:  # else it is this caller's own end, and no other's
                flight.error = error
            raise
        finally:
            with self._lock:
                del self._flights[ref]
            flight.done.set()

    def _bring(self, ref: str, fetch: Fetch, name: str, sha256: str | None) -> Path:
        place = self._places[0]
        for folder in ("refs", "files", "partial"):
            (place / folder).mkdir(parents=True, exist_ok=True)
        part = self._part(ref, place / "partial")
        try:
            promised = fetch(part, lambda size: self._reserve(part, size))
            with part.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if {sha256, promised} - {None, found}:
                forget(part)
                raise FetchFailed("it has another sha256 than promised")
            return self._keep(ref, part, place, found, name)
        finally:
            with self._lock:
                self._reserved.pop(part, None)

    def _part(self, ref: str, folder: Path) -> Path:
        """A file of this store's own to download into: no other worker writes there.

        What a worker that is gone left of the same download is taken over.
        """
        part = folder / f"{_hash(ref)}.{self._own}.part"
        if not part.exists():
            for old in folder.glob(f"{_hash(ref)}.*.part"):
                with suppress(OSError):  # somebody else took it
                    if age(old.stat().st_mtime) > ABANDONED:
                        old.with_suffix(".tag").replace(part.with_suffix(".tag"))
                        old.replace(part)
                        break
        return part

    def _keep(self, ref: str, part: Path, place: Path, sha256: str, name: str) -> Path:
        path = place / "files" / f"{sha256}.safetensors"
        part.replace(path)
        _touch(path)
        self._refer(place, ref, sha256, name)
        with self._lock:
            self._fetches += 1
            self._bytes = self._measure()
        return path

    def _refer(self, place: Path, ref: str, sha256: str, name: str) -> None:
        _write_ref(place, ref, sha256, name)
        with self._lock:
            _drop_oldest_refs(place)

    # -- room ----------------------------------------------------------------------------------

    def _reserve(self, part: Path, size: int) -> None:
        """Make room for `part` to grow to `size` bytes; raises FetchFailed if there is none."""
        if size > self._max_bytes:
            raise FetchFailed(
                f"it is larger than the whole cache of {self._max_bytes / 1e9:g} GB "
                f"({self._setting})"
            )
        with self._lock:
            self._reserved[part] = size
            if not self._make_room(part):
                del self._reserved[part]
                raise FetchFailed(
                    "the cache, or its disk, is full of files in use: try again later, or raise "
                    f"{self._setting}",
                    retryable=True,
                )

    def _make_room(self, part: Path) -> bool:
        """Delete what was not used for longest until all that is reserved fits; False if it does
        not even then."""
        place = self._places[0]
        entries = sorted(self._entries(place))
        total = sum(size for _, size, _ in entries)
        total += sum(max(0, size - _size(path)) for path, size in self._reserved.items())
        growth = self._reserved[part] - _size(part)
        count = len(entries)
        for used, size, path in entries:
            fits = total <= self._max_bytes and growth + HEADROOM <= self._free(place)
            if fits and count < MAX_FILES:
                return True
            lasting = ABANDONED if path.suffix == ".part" else self._grace
            if path not in self._reserved and age(used) >= lasting:
                self.drop(path)
                total -= size
                count -= 1
        return total <= self._max_bytes and growth + HEADROOM <= self._free(place)

    def _measure(self) -> int:
        return sum(size for _, size, _ in self._entries(self._places[0]))

    def _entries(self, place: Path) -> list[tuple[float, int, Path]]:
        """Last use, bytes and path of everything that counts."""
        found = []
        for pattern in ("files/*.safetensors", "partial/*.part"):
            for path in place.glob(pattern):
                with suppress(OSError):
                    found.append((_last_use(path), path.stat().st_size, path))
        return found

    def _drop_forgotten(self) -> None:
        place = self._places[0]
        unfinished = (path for path in place.glob("refs/*") if path.suffix != ".json")
        for left in (*place.glob("partial/*"), *unfinished):
            with suppress(OSError):
                if age(left.stat().st_mtime) > FORGOTTEN:
                    left.unlink()


def _read_ref(place: Path, ref: str) -> Known | None:
    return _read_entry(place, place / "refs" / f"{_hash(ref)}.json")


def _read_entry(place: Path, entry: Path) -> Known | None:
    """What one entry says, if its file is there and whole."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        stored = json.loads(entry.read_text())
        sha256, size = str(stored["sha256"]), stored["size"]
        path = place / "files" / f"{sha256}.safetensors"
        if _SHA256.fullmatch(sha256) and path.stat().st_size == size:
            return Known(path, str(stored["name"]), entry.stat().st_mtime)
    return None


def _write_ref(place: Path, ref: str, sha256: str, name: str) -> None:
    """Note what a reference leads to. The reference itself, which can hold a token, is not kept."""
    size = (place / "files" / f"{sha256}.safetensors").stat().st_size
    entry = place / "refs" / f"{_hash(ref)}.json"
    fresh = entry.with_suffix(f".{uuid.uuid4().hex[:12]}")
    fresh.write_text(json.dumps({"name": name, "sha256": sha256, "size": size}))
    fresh.replace(entry)


def _drop_oldest_refs(place: Path) -> None:
    """Forget what references led to, above MAX_FILES: those that lead nowhere any more first."""
    entries = list((place / "refs").glob("*.json"))
    if len(entries) <= MAX_FILES:
        return

    def last(entry: Path) -> tuple[bool, float]:
        with suppress(OSError):
            return _read_entry(place, entry) is not None, entry.stat().st_mtime
        return False, 0.0

    for entry in sorted(entries, key=last)[: len(entries) - MAX_FILES * 7 // 8]:
        entry.unlink(missing_ok=True)


def _touch(path: Path) -> None:
    """Note a use, beside the content."""
    with suppress(OSError):  # a read-only volume
        path.with_suffix(USED).touch()


def _last_use(path: Path) -> float:
    """When a file was used or written last, in seconds since 1970."""
    times = [path.stat().st_mtime]
    with suppress(OSError):
        times.append(path.with_suffix(USED).stat().st_mtime)
    return max(times)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _hash(ref: str) -> str:
    return hashlib.sha256(ref.encode()).hexdigest()[:32]


def _temporary() -> Path:
    """A folder of this user's among the temporary files."""
    folder = Path(tempfile.gettempdir()) / f"klein-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        return Path(tempfile.mkdtemp(prefix="klein-"))
    return folder


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
