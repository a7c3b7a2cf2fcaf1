"""The folder of local LoRAs: what is in it, and adding to and deleting from it.

Names come from callers. Nothing outside the folder is read, and nothing but a LoRA and what is
kept beside it is deleted.
"""

import os
import re
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from klein.errors import InvalidRequest, LoraError, LoraUnavailable
from klein.lora import file
from klein.sources.fetch import MAX_BYTES
from klein.sources.reference import SUFFIX

ABANDONED = 86400.0
"""Seconds after which what an interrupted upload left is deleted."""
_NAME = re.compile(r"[\w][\w .+-]{0,120}\.safetensors")
_MAX_NAME_BYTES = 200
_NO_FOLDER = "no folder for local LoRAs is set; start klein with KLEIN_LORA_DIR"


class LoraFolder:
    """The LoRAs below `root`; None is a deployment without any."""

    def __init__(self, root: Path | None) -> None:
        self.root = root.resolve() if root else None

    def names(self) -> list[str]:
        """Every name a request can give; a name may still lead to nothing usable."""
        if self.root is None:
            return []
        found = self.root.rglob(f"*{SUFFIX}")
        inside = (path for path in found if self._is_inside(path))
        return sorted(str(path.relative_to(self.root)) for path in inside)

    def path(self, name: str) -> Path:
        """The file of a local LoRA; raises LoraError, naming what there is instead."""
        root = self._root(name)
        try:
            path = Path(os.path.realpath(root / name))
            is_file = path.is_file()
        except (OSError, ValueError) as error:
            raise LoraError(f"LoRA {name!r}: that is no file name") from error
        if Path(name).is_absolute() or not path.is_relative_to(root):
            raise LoraError(f"LoRA {name!r} lies outside the LoRA folder; name it relative to that")
        if not is_file:
            if os.path.lexists(root / name):
                raise LoraError(f"LoRA {name!r} is no file, or a link to none")
            there = ", ".join(shown(other) for other in self.names()[:10]) or "no LoRA"
            raise LoraError(f"LoRA {name!r} is not in the LoRA folder, which holds {there}")
        return path

    def add(self, name: str, chunks: Iterable[bytes]) -> Path:
        """Write a file under a new `name`; raises InvalidRequest for a name that cannot be taken,
        LoraError for what is no usable LoRA, LoraUnavailable as the disk does."""
        target = self._new(name)
        self._drop_abandoned()
        part = target.with_name(f".{uuid.uuid4().hex}.part")
        try:
            _write(part, name, chunks)
            file.inspect(part, name)
            _place(part, target, name)
        except OSError as error:
            raise LoraUnavailable(f"LoRA {name!r} cannot be written ({error.strerror})") from error
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)
        return target

    def remove(self, name: str) -> None:
        """Delete a LoRA, or the link that stands for it, and its defaults; raises LoraError if
        there is none of that name."""
        self.path(name)
        entry = self._root(name) / name
        if entry.suffix != SUFFIX:
            raise LoraError(f"LoRA {name!r}: only {SUFFIX} files can be deleted")
        if not Path(os.path.realpath(entry.parent)).is_relative_to(self._root(name)):
            raise LoraError(f"LoRA {name!r} lies outside the LoRA folder; name it relative to that")
        try:
            entry.unlink()
            entry.with_suffix(".toml").unlink(missing_ok=True)
        except FileNotFoundError as error:
            raise LoraError(f"LoRA {name!r} is not in the LoRA folder any more") from error
        except OSError as error:
            raise LoraUnavailable(f"LoRA {name!r} cannot be deleted ({error.strerror})") from error

    def _root(self, name: str) -> Path:
        if self.root is None:
            raise LoraError(f"LoRA {name!r}: {_NO_FOLDER}")
        return self.root

    def _new(self, name: str) -> Path:
        if self.root is None:
            raise LoraError(_NO_FOLDER)
        if (
            not isinstance(name, str)
            or not _NAME.fullmatch(name)
            or len(name.encode()) > _MAX_NAME_BYTES
        ):
            raise InvalidRequest(
                f"name: {str(name)[:200]!r} must be a plain file name that ends in {SUFFIX}",
                field="name",
            )
        if os.path.lexists(self.root / name):
            raise _taken(name)
        return self.root / name

    def _is_inside(self, path: Path) -> bool:
        return self.root is not None and Path(os.path.realpath(path)).is_relative_to(self.root)

    def _drop_abandoned(self) -> None:
        """Delete what uploads left that were killed on their way."""
        for part in self.root.glob(".*.part") if self.root else ():
            with suppress(OSError):
                if time.time() - part.stat().st_mtime > ABANDONED:
                    part.unlink()


def shown(name: str) -> str:
    """A file name as text, also one that is not written in UTF-8."""
    return os.fsencode(name).decode("utf-8", "replace")


def _write(part: Path, name: str, chunks: Iterable[bytes]) -> None:
    size = 0
    with part.open("xb") as out:
        for chunk in chunks:
            size += len(chunk)
            if size > MAX_BYTES:
                raise LoraError(f"LoRA {name!r} is larger than {MAX_BYTES} bytes")
            out.write(chunk)


def _place(part: Path, target: Path, name: str) -> None:
    """Give a whole file its name, unless another was quicker."""
    try:
        os.link(part, target)
    except FileExistsError as error:
        raise _taken(name) from error
    except OSError:  # a file system without hard links
        if os.path.lexists(target):
            raise _taken(name) from None
        part.replace(target)


def _taken(name: str) -> InvalidRequest:
    return InvalidRequest(f"name: there is a LoRA {name!r} already; delete it first", field="name")
