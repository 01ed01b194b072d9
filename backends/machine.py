"""Cores, memory and GPUs of this machine; None for memory that the system does not tell."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ctypes


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU of this machine, as its driver describes it."""

    name: str
    sm: int
    """Compute capability, 10 x major + minor: 89 for 8.9."""
    memory: int
    """Bytes."""

    def as_json(self) -> dict[str, object]:
        """Return the form of `n3c doctor --json`."""
        return {"name": self.name, "sm": self.sm, "memory_bytes": self.memory}


def _library(linux: str, windows: str) -> ctypes.CDLL | None:
    import ctypes  # here, as `n3c check` starts faster without

    try:
        return ctypes.CDLL(windows if sys.platform == "win32" else linux)
    except OSError:
        return None


def devices() -> tuple[Device, ...]:
    """Return the NVIDIA GPUs of this machine. Nothing without a driver."""
    import ctypes

    major, minor = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h
    driver, count = _library("libcuda.so.1", "nvcuda.dll"), ctypes.c_int()
    if driver is None or driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()

    def attribute(which: int, device: int) -> int:
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), which, device)
        return value.value

    def described(device: int) -> Device:
        name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
        driver.cuDeviceGetName(name, len(name), device)
        driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        sm = 10 * attribute(major, device) + attribute(minor, device)
        return Device(name.value.decode(errors="replace"), sm, memory.value)

    return tuple(map(described, range(count.value)))


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver, as `580.95.05`; None without one."""
    import ctypes

    management, text = _library("libnvidia-ml.so.1", "nvml.dll"), ctypes.create_string_buffer(80)
    if management is None or management.nvmlInit_v2():
        return None
    failed = management.nvmlSystemGetDriverVersion(text, len(text))
    management.nvmlShutdown()
    return None if failed else text.value.decode(errors="replace")


def compute_capabilities() -> tuple[int, ...]:
    """Return the SM version of each NVIDIA GPU, as its driver numbers them: 89 for 8.9. Nothing without a driver."""
    return tuple(device.sm for device in devices())


def memory_bytes() -> int | None:
    """Return the size of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None


def available_memory_bytes() -> int | None:
    """Return how much memory programs may still take: what Linux calls available, within the limit of the container."""
    try:
        rows = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available = int(next(row for row in rows if row.startswith("MemAvailable:")).split()[1]) * 1024
    except (OSError, StopIteration):
        return None
    with contextlib.suppress(OSError, ValueError, StopIteration):  # `max` where there is no limit
        limit, held = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text("ascii")) for name in ("max", "current"))
        rows = Path("/sys/fs/cgroup/memory.stat").read_text(encoding="ascii").splitlines()
        cached = int(next(row for row in rows if row.startswith("inactive_file ")).split()[1])
        available = min(available, limit - held + cached)
    return available


def rss_bytes(process: int) -> int | None:
    """Return the memory that a process of this machine holds, by its id."""
    return _status_bytes(process, "VmRSS")


def _status_bytes(process: int | str, key: str) -> int | None:
    """Return a figure of what Linux says of a process; None elsewhere."""
    with contextlib.suppress(OSError, StopIteration):
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in status if line.startswith(f"{key}:")).split()[1]) * 1024
    return None


def peak_rss_bytes() -> int | None:
    """Return the most memory that this process has held."""
    if sys.platform == "win32":
        return None
    if (peak := _status_bytes("self", "VmHWM")) is not None:  # getrusage also counts what its parent held before exec
        return peak
    try:
        import resource
    except ModuleNotFoundError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere
