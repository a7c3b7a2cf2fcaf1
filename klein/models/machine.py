"""What this machine has, told without torch: GPUs through NVML, memory and disk from the system."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Gpu:
    """One NVIDIA GPU; memory in bytes, compute capability as (9, 0)."""

    name: str
    total: int
    free: int
    capability: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Machine:
    """GPUs that this process may use, and free bytes of memory and of the disk at home."""

    gpus: tuple[Gpu, ...]
    memory_free: int
    disk_free: int

    @classmethod
    def probe(cls, environ: Mapping[str, str]) -> "Machine":
        """Look now. `environ` is read for CUDA_VISIBLE_DEVICES."""
        return cls(
            gpus=_gpus(environ.get("CUDA_VISIBLE_DEVICES")),
            memory_free=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") + _reclaimable(),
            disk_free=shutil.disk_usage(Path.home()).free,
        )


def _gpus(visible: str | None) -> tuple[Gpu, ...]:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    found = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        if visible is None or {str(index), _uuid(pynvml.nvmlDeviceGetUUID(handle))} & {
            _uuid(name.strip()) for name in visible.split(",")
        }:
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            name = pynvml.nvmlDeviceGetName(handle)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            found.append(Gpu(str(name), int(memory.total), int(memory.free), (major, minor)))
    return tuple(found)


def _uuid(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def _reclaimable() -> int:
    """Bytes of page cache that the system gives back when asked; 0 where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if ":" in line}
    return max(0, sizes.get("MemAvailable", 0) - sizes.get("MemFree", 0))
