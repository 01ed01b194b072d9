# ruff: noqa: N802 -- the names are those of the driver
"""The GPUs of a machine, asked of a stand-in for NVIDIA's driver."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import pytest

from n3c.backends.machine import Device, compute_capabilities, devices, driver_version
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
