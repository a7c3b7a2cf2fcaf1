"""What this machine has, told without torch: GPUs through NVML, memory and disk from the system."""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["cuda", "cpu"]


@dataclass(frozen=True, slots=True)
class Device:
    """What a model runs on. `index` is CUDA's, in the order of CUDA_VISIBLE_DEVICES; `total` and
    `free` are bytes of its memory, `capability` a GPU's compute capability as (9, 0)."""

    kind: Kind
    name: str
    total: int
    free: int
    capability: tuple[int, int] = (0, 0)
    index: int = 0

    def __str__(self) -> str:
        """As torch names it."""
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"


@dataclass(frozen=True, slots=True)
class Machine:
    """GPUs that this process may use, and free bytes of memory and of the disk at home."""

    gpus: tuple[Device, ...]
    memory_free: int
    disk_free: int

    @classmethod
    def probe(cls, environ: Mapping[str, str]) -> "Machine":
        """Look now. `environ` is read for CUDA_VISIBLE_DEVICES."""
        import pynvml

        return cls(
            gpus=gpus(pynvml, environ.get("CUDA_VISIBLE_DEVICES")),
            memory_free=memory_free(Path("/")),
            disk_free=shutil.disk_usage(Path.home()).free,
        )

    def device(self, kind: Kind) -> Device:
        """The device of a kind that a model is put on: the first GPU, or the CPU."""
        if kind == "cuda":
            return self.gpus[0]
        return Device("cpu", "cpu", self.memory_free, self.memory_free)


# -- GPUs --------------------------------------------------------------------------------------


def gpus(nvml: Any, visible: str | None) -> tuple[Device, ...]:
    """The GPUs that CUDA shows a process with this CUDA_VISIBLE_DEVICES (None: unset), in its
    order. `nvml` is the module pynvml.

    Numbers count as NVML does, by PCI bus. CUDA does too among equal GPUs; among unequal ones
    only with CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """
    try:
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        if visible is not None and visible.strip().startswith("MIG-"):
            chosen = _mig_by_id(nvml, handles, visible)
        else:
            order: Sequence[int] = range(len(handles))
            if visible is not None:
                order = visible_indices(visible, [_uuid(nvml, handle) for handle in handles])
            chosen = [(handles[i], _first_mig(nvml, handles[i])) for i in order]
        return tuple(_device(nvml, index, *pair) for index, pair in enumerate(chosen))
    except nvml.NVMLError:
        return ()


def visible_indices(visible: str, uuids: Sequence[str]) -> Sequence[int]:
    """The GPUs that CUDA_VISIBLE_DEVICES names, `uuids` being those there are.

    As CUDA reads it: numbers, or prefixes of UUIDs that fit one GPU. The first entry that is
    neither ends the list; one that is repeated empties it.
    """
    found: list[int] = []
    by_uuid = visible.strip().startswith("GPU-")
    for entry in (entry.strip() for entry in visible.split(",")):
        index = _by_uuid(entry, uuids) if by_uuid else _by_number(entry, len(uuids))
        if index is None:
            break
        if index in found:
            return []
        found.append(index)
    return found


def _by_uuid(entry: str, uuids: Sequence[str]) -> int | None:
    fitting = [i for i, uuid in enumerate(uuids) if entry and uuid.startswith(entry)]
    return fitting[0] if len(fitting) == 1 else None


def _by_number(entry: str, count: int) -> int | None:
    """The number an entry begins with, as C's strtol reads it: `1gpu` is 1."""
    digits = re.match(r"\+?(\d{1,9})", entry)
    return int(digits[1]) if digits and int(digits[1]) < count else None


def _uuid(nvml: Any, handle: Any) -> str:
    return _text(nvml.nvmlDeviceGetUUID(handle))


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def _mig_by_id(nvml: Any, handles: Sequence[Any], visible: str) -> list[tuple[Any, Any]]:
    """The GPU and the MIG instance of the first entry; CUDA shows no more than one instance."""
    wanted = visible.split(",")[0].strip()
    for handle in handles:
        for part in _migs(nvml, handle):
            if _uuid(nvml, part).startswith(wanted):
                return [(handle, part)]
    return []


def _first_mig(nvml: Any, handle: Any) -> Any:
    """The instance that CUDA takes of a GPU in MIG mode, or the GPU itself."""
    return next(iter(_migs(nvml, handle)), handle)


def _migs(nvml: Any, handle: Any) -> list[Any]:
    try:
        if not nvml.nvmlDeviceGetMigMode(handle)[0]:
            return []
        count = nvml.nvmlDeviceGetMaxMigDeviceCount(handle)
    except nvml.NVMLError:  # a GPU that knows no MIG
        return []
    found = []
    for index in range(count):
        try:
            found.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index))
        except nvml.NVMLError:  # this place is empty
            continue
    return found


def _device(nvml: Any, index: int, gpu: Any, memory_of: Any) -> Device:
    memory = nvml.nvmlDeviceGetMemoryInfo(memory_of)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(gpu)
    name = _text(nvml.nvmlDeviceGetName(memory_of))
    return Device("cuda", name, int(memory.total), int(memory.free), (major, minor), index)


# -- memory ------------------------------------------------------------------------------------


def memory_free(root: Path) -> int:
    """Bytes this process can still take: what the machine has available, or what is left under
    the limits of its control groups, if that is less. `root` is `/`."""
    return min([_available(root), *_left_in_groups(root)])


def _available(root: Path) -> int:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if ":" in line}
        return sizes["MemAvailable"]
    except (OSError, ValueError, KeyError, IndexError):  # not Linux, or a very old one
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


@dataclass(frozen=True, slots=True)
class _Group:
    """A version of control groups: where its memory files are, and what they are called."""

    mount: str
    limit: str
    used: str
    cache: str
    """The line of memory.stat that counts file pages which are given back when asked."""


_V1 = _Group(
    "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
)
_V2 = _Group("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")


def _left_in_groups(root: Path) -> list[int]:
    """What is left under each limit, from this process's group up to the root."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        version = _V2 if number == "0" else _V1 if "memory" in controllers.split(",") else None
        if version is None:
            continue
        group = Path(path.strip("/"))
        for place in (group, *group.parents):
            if (free := _left(root / version.mount / place, version)) is not None:
                left.append(free)
    return left


def _left(folder: Path, names: _Group) -> int | None:
    """Bytes left in one group, None where it has no limit or does not say."""
    try:
        limit = int((folder / names.limit).read_text())  # "max" is no number
        used = int((folder / names.used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(0, limit - used + int(stat.get(names.cache, 0)))
    except (OSError, ValueError):
        return None
