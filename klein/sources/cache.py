"""Fetched LoRAs on disk, by content, the least recently used thrown away first.

    refs/<hash of the reference>.json   which content a reference led to
    files/<sha256>.safetensors          the content; its time is that of its last use
    partial/<hash of the reference>.<store>.part   a download under way, or interrupted

Everything appears by renaming, so workers can share the folder on a network volume. A file that
was used within `grace` seconds, which no job outlives, is never thrown away.
"""

import hashlib
import json
import logging
import os
import tempfile
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

log = logging.getLogger("bentoml.klein")

ABANDONED = 120.0
"""Seconds without a byte after which a download is nobody's: its reader gave up after 30."""


class LoraStore:
    """A folder of fetched LoRAs of at most `max_bytes`, where it can be written."""

    def __init__(self, folder: Path, max_bytes: float, grace: float) -> None:
        self._places = [folder]
        if not _writable(folder):
            temporary = Path(tempfile.gettempdir()) / "klein-loras"
            log.warning("%s cannot be written: new LoRAs are kept in %s", folder, temporary)
            temporary.mkdir(parents=True, exist_ok=True)
            self._places.insert(0, temporary)
        self._max_bytes = max_bytes
        self._grace = grace
        self._own = uuid.uuid4().hex[:12]
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def get(self, ref: str, fetch: Callable[[Path], None]) -> Path:
        """The file that `ref` leads to. `fetch` is called with a path to write it to if it is not
        there yet; when several threads want the same, one fetches and the others wait."""
        with self._locks[ref]:
            if found := self._find(ref):
                return found
            place = self._places[0]
            for name in ("refs", "files", "partial"):
                (place / name).mkdir(parents=True, exist_ok=True)
            part = self._part(ref, place / "partial")
            fetch(part)
            path = self._keep(ref, part, place)
        self._throw_away()
        return path

    def refs(self) -> dict[str, Path]:
        """Every reference with a file."""
        known = {}
        for place in self._places:
            for entry in (place / "refs").glob("*.json"):
                with suppress(OSError, ValueError, KeyError):
                    stored = json.loads(entry.read_text())
                    path = place / "files" / f"{stored['sha256']}.safetensors"
                    if path.exists():
                        known[str(stored["ref"])] = path
        return known

    def _find(self, ref: str) -> Path | None:
        for place in self._places:
            with suppress(OSError, ValueError, KeyError):
                stored = json.loads((place / "refs" / f"{_hash(ref)}.json").read_text())
                path = place / "files" / f"{stored['sha256']}.safetensors"
                if path.stat().st_size == stored["size"]:
                    with suppress(OSError):  # a read-only volume
                        os.utime(path)
                    return path
        return None

    def _part(self, ref: str, folder: Path) -> Path:
        """A file of this store's own to download into: no other worker writes there.

        What a worker that is gone left of the same download is taken over.
        """
        part = folder / f"{_hash(ref)}.{self._own}.part"
        if not part.exists():
            for old in folder.glob(f"{_hash(ref)}.*.part"):
                with suppress(OSError):  # somebody else took it
                    if time.time() - old.stat().st_mtime > ABANDONED:
                        old.with_suffix(".tag").replace(part.with_suffix(".tag"))
                        old.replace(part)
                        break
        return part

    def _keep(self, ref: str, part: Path, place: Path) -> Path:
        with part.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        size = part.stat().st_size
        path = place / "files" / f"{sha256}.safetensors"
        part.replace(path)
        entry = place / "refs" / f"{_hash(ref)}.json"
        fresh = entry.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        fresh.write_text(json.dumps({"ref": ref, "sha256": sha256, "size": size}))
        fresh.replace(entry)
        return path

    def _throw_away(self) -> None:
        """Delete what was not used for longest until the rest fits."""
        entries = []
        for path in (self._places[0] / "files").glob("*.safetensors"):
            with suppress(OSError):
                stat = path.stat()
                entries.append((stat.st_mtime, stat.st_size, path))
        total = sum(size for _, size, _ in entries)
        for used, size, path in sorted(entries):
            if total <= self._max_bytes or time.time() - used < self._grace:
                return
            path.unlink(missing_ok=True)
            total -= size


def _hash(ref: str) -> str:
    return hashlib.sha256(ref.encode()).hexdigest()[:32]


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
