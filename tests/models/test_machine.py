from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from klein.models.catalog import GB
from klein.models.machine import Device, Machine, gpus, memory_free, visible_indices

UUIDS = ("GPU-aa11", "GPU-aa22", "GPU-bb33")


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        ("0,1,2", [0, 1, 2]),
        ("2,0", [2, 0]),
        (" 1 , 0 ", [1, 0]),
        ("1,7,0", [1]),
        ("1,-1,0", [1]),
        ("1,,0", [1]),
        ("1,x,0", [1]),
        ("1gpu,0", [1, 0]),
        ("", []),
        ("-1", []),
        ("none", []),
        ("0,0", []),
        ("1,2,1", []),
        ("GPU-bb33,GPU-aa11", [2, 0]),
        ("GPU-bb,GPU-aa1", [2, 0]),
        ("GPU-aa", []),
        ("GPU-bb33,GPU-zz,GPU-aa11", [2]),
        ("GPU-bb33,0", [2]),
        ("GPU-bb33,GPU-bb", []),
        ("1,GPU-bb33", [1]),
    ],
)
def test_visible_devices_are_read_as_cuda_reads_them(visible: str, indices: list[int]) -> None:
    """In the order named; what is neither a number nor one GPU's UUID ends the list, and what is
    named twice empties it."""
    assert list(visible_indices(visible, UUIDS)) == indices


class FakeNvml:
    """Three GPUs of one size each; the last is split into two MIG instances."""

    class NVMLError(Exception):
        pass

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return 3

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return UUIDS[index]

    def nvmlDeviceGetUUID(self, handle: str) -> bytes:
        return handle.encode()

    def nvmlDeviceGetName(self, handle: str) -> str:
        return f"name of {handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        size = (10 if "MIG" in handle else 80) * GB
        return SimpleNamespace(total=size, free=size)

    def nvmlDeviceGetCudaComputeCapability(self, handle: str) -> tuple[int, int]:
        return (9, 0) if handle == "GPU-bb33" else (8, 6)

    def nvmlDeviceGetMigMode(self, handle: str) -> tuple[int, int]:
        if handle == "GPU-aa11":
            raise self.NVMLError("not supported")
        return (1, 1) if handle == "GPU-bb33" else (0, 0)

    def nvmlDeviceGetMaxMigDeviceCount(self, _: str) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: str, index: int) -> str:
        if index not in (1, 2):
            raise self.NVMLError("not found")
        return f"MIG-{handle}-{index}"


def test_the_first_gpu_is_cudas_first() -> None:
    """Whatever NVML counts first; its index is torch's, its memory that of the instance."""
    first, second = gpus(FakeNvml(), "1,0")
    assert (first.name, first.index, str(first)) == ("name of GPU-aa22", 0, "cuda:0")
    assert (second.name, second.index, second.capability) == ("name of GPU-aa11", 1, (8, 6))
    assert [gpu.total // GB for gpu in gpus(FakeNvml(), None)] == [80, 80, 10]
    assert gpus(FakeNvml(), "") == ()


def test_a_mig_instance_is_its_own_size() -> None:
    """Named by its id or the beginning of it; CUDA shows one at a time."""
    (device,) = gpus(FakeNvml(), "MIG-GPU-bb33-2,MIG-GPU-bb33-1")
    assert (device.name, device.total, device.capability) == (
        "name of MIG-GPU-bb33-2",
        10 * GB,
        (9, 0),
    )
    assert gpus(FakeNvml(), "MIG-nowhere") == ()


def test_no_driver_is_no_gpu() -> None:
    """And no error."""

    class NoDriver(FakeNvml):
        def nvmlInit(self) -> None:
            raise self.NVMLError("no driver")

    assert gpus(NoDriver(), None) == ()
    assert Machine((), 5 * GB, 0).device("cpu") == Device("cpu", "cpu", 5 * GB, 5 * GB)


def _files(root: Path, files: dict[str, str]) -> Path:
    for name, text in ({"proc/meminfo": "MemFree: 1 kB\nMemAvailable: 8000 kB\n"} | files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V2 = {
    "proc/self/cgroup": "0::/a/b\n",
    "sys/fs/cgroup/a/b/memory.max": "max\n",
    "sys/fs/cgroup/a/b/memory.current": "3000000\n",
    "sys/fs/cgroup/a/b/memory.stat": "anon 1\n",
    "sys/fs/cgroup/a/memory.max": "4000000\n",
    "sys/fs/cgroup/a/memory.current": "3000000\n",
    "sys/fs/cgroup/a/memory.stat": "anon 1\ninactive_file 500000\n",
}
V1 = {
    "proc/self/cgroup": "9:name=systemd:/x\n5:cpu,memory:/docker/1\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "2000000\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "1500000\n",
    "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 100000\n",
}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 8_192_000),
        (V2, 1_500_000),
        (V2 | {"sys/fs/cgroup/a/memory.current": "9000000\n"}, 0),
        (V2 | {"sys/fs/cgroup/a/memory.max": "max\n"}, 8_192_000),
        (V2 | {"sys/fs/cgroup/a/memory.max": "99999999999\n"}, 8_192_000),
        (V1, 600_000),
        ({"proc/self/cgroup": "nonsense\n"}, 8_192_000),
    ],
    ids=["none", "v2", "v2 over", "v2 max", "v2 large", "v1", "nonsense"],
)
def test_a_containers_limit_counts(tmp_path: Path, files: dict[str, str], free: int) -> None:
    """The narrowest of the groups above this process, cached file pages given back."""
    assert memory_free(_files(tmp_path, files)) == free
