# ruff: noqa: N802 -- the names are those of the driver
"""The GPUs of a machine, asked of a stand-in for NVIDIA's driver; its memory, of what a system tells."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from n3c.backends.machine import (
    Device,
    available_memory_bytes,
    compute_capabilities,
    devices,
    driver_version,
    memory_bytes,
    peak_rss_bytes,
    rss_bytes,
    usable_cores,
)
from n3c.compiler.report.abilities import abilities, narrow_types

CARDS = ((b"NVIDIA GeForce RTX 4090", 8, 9, 24_564 * 2**20), (b"NVIDIA B200", 10, 0, 183_359 * 2**20))
PACKAGES: tuple[str, ...] = (
    "torch", "onnx", "onnx-ir", "onnxruntime", "tensorrt-rtx", "tensorrt", "transformer-engine",
)  # fmt: skip
EVERYTHING: Mapping[str, str | None] = dict.fromkeys(PACKAGES, "1.0")


class Driver:
    """What `libcuda.so.1` and `libnvidia-ml.so.1` answer."""

    def __init__(self, name: str) -> None:
        assert name in ("libcuda.so.1", "libnvidia-ml.so.1", "nvcuda.dll", "nvml.dll")

    def cuInit(self, flags: int) -> int:
        return flags

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = len(CARDS)
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: int) -> None:
        name.value = CARDS[device][0][: size - 1]

    def cuDeviceTotalMem_v2(self, memory: Any, device: int) -> None:
        memory._obj.value = CARDS[device][3]

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> None:
        value._obj.value = CARDS[device][{75: 1, 76: 2}[attribute]]

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlShutdown(self) -> int:
        return 0

    def nvmlSystemGetDriverVersion(self, text: Any, size: int) -> int:
        text.value = b"580.95.05"[: size - 1]
        return 0


def test_every_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", Driver)
    assert devices() == (
        Device("NVIDIA GeForce RTX 4090", 89, 25_757_220_864),
        Device("NVIDIA B200", 100, 183_359 * 2**20),
    )
    assert compute_capabilities() == (89, 100)
    assert driver_version() == "580.95.05"


def test_a_machine_without_a_driver_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert (devices(), driver_version()) == ((), None)


GIB = 2**30
MEMORY = {"/proc/meminfo": "MemTotal: 32 kB\nMemAvailable:    8388608 kB\n"}
GROUP = {
    "/sys/fs/cgroup/memory.max": str(6 * GIB),
    "/sys/fs/cgroup/memory.current": str(3 * GIB),
    "/sys/fs/cgroup/memory.stat": f"anon 7\ninactive_file {GIB}\n",
}
STATUS = {"/proc/self/status": "Name:\tx\nVmHWM:\t   300 kB\nVmRSS:\t 20 kB\n", "/proc/7/status": "VmRSS:\t    12 kB\n"}


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The files of Linux that are read, by their paths: none at first."""
    found: dict[str, str] = {}

    def read_text(path: Path, encoding: str) -> str:
        if str(path) not in found:
            raise FileNotFoundError(path)
        return found[str(path)]

    monkeypatch.setattr(Path, "read_text", read_text)
    return found


@pytest.mark.parametrize(
    ("there", "available"),
    [
        ({}, None),
        ({"/proc/meminfo": "MemTotal: 32 kB\n"}, None),
        (MEMORY, 8 * GIB),
        (MEMORY | GROUP, 4 * GIB),  # its limit less what it holds, of which it would give back what is cached
        (MEMORY | GROUP | {"/sys/fs/cgroup/memory.max": str(60 * GIB)}, 8 * GIB),
        (MEMORY | GROUP | {"/sys/fs/cgroup/memory.max": "max\n"}, 8 * GIB),
        (MEMORY | GROUP | {"/sys/fs/cgroup/memory.stat": "anon 7\n"}, 8 * GIB),
    ],
)
def test_memory_that_programs_may_take(files: dict[str, str], there: dict[str, str], available: int | None) -> None:
    files |= there
    assert available_memory_bytes() == available


def test_memory_of_a_process(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Linux does not tell the peak, the system's own count: bytes on macOS, KiB elsewhere."""

    def getrusage(who: int) -> SimpleNamespace:
        return SimpleNamespace(ru_maxrss=5)

    monkeypatch.setattr("resource.getrusage", getrusage)
    assert (rss_bytes(7), peak_rss_bytes()) == (None, 5 * 1024)
    monkeypatch.setattr("sys.platform", "darwin")
    assert peak_rss_bytes() == 5
    files |= STATUS
    assert (rss_bytes(7), peak_rss_bytes()) == (12 * 1024, 300 * 1024)
    monkeypatch.setattr("sys.platform", "win32")
    assert peak_rss_bytes() is None


def test_memory_and_cores_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}.__getitem__)
    monkeypatch.setattr("os.sched_getaffinity", {0: {1, 5, 6}}.__getitem__)
    assert (memory_bytes(), usable_cores()) == (4_096_000, 3)
    monkeypatch.delattr("os.sysconf")
    monkeypatch.delattr("os.sched_getaffinity")
    for count, cores in ((8, 8), (None, 1)):
        monkeypatch.setattr("os.cpu_count", lambda count=count: count)
        assert (memory_bytes(), usable_cores()) == (None, cores)


def lacking(packages: Mapping[str, str | None], *sms: int) -> dict[str, str]:
    """Return what cannot be done, and what that lacks."""
    found = abilities(packages, [Device("a GPU", sm, 2**34) for sm in sms])
    return {ability.what: ability.lacks for ability in found if ability.lacks}


def test_what_a_machine_lets_one_do() -> None:
    assert lacking(EVERYTHING, 120) == {}
    assert lacking(EVERYTHING, 89) == {"train.py on a GPU: NVFP4": "a GPU of SM 100 or later, with FP4"}
    assert set(lacking(EVERYTHING, 90)) == {"train.py on a GPU: NVFP4", "plans of --trt rtx on a GPU"}
    assert "run, bench: --device cuda --engine torch" in lacking(EVERYTHING, 75)
    assert lacking(EVERYTHING, 75, 120) == {}
    assert lacking({**EVERYTHING, "tensorrt-rtx": None}, 120) == {
        "plans of --trt rtx on a GPU": "the package tensorrt-rtx"
    }
    without = lacking({**EVERYTHING, "torch": "2.13.0+cpu", "onnx-ir": None}, 120)
    assert without["train.py on a GPU: BF16"] == "a PyTorch with CUDA (torch 2.13.0+cpu is for CPUs)"
    assert without["build --target onnx"] == "the package onnx-ir"
    assert set(lacking(EVERYTHING).values()) == {"an NVIDIA GPU"}


def test_the_types_of_tensor_cores() -> None:
    assert [narrow_types(sm) for sm in (75, 86, 89, 120, 999)] == [
        "none", "BF16", "BF16, FP8", "BF16, FP8, FP4", "not known to n3c",
    ]  # fmt: skip
