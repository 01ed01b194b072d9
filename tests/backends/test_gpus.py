"""The table of GPUs: each peak against multiprocessors x clock x operations a clock, sizes against the names."""

from __future__ import annotations

from itertools import pairwise
from math import log2

import pytest

from n3c.backends.gpus import GPUS, Gpu, gpu_named
from n3c.backends.trt.targets import TARGETS, served_gpus, serving
from n3c.ir.types import DType
from support.golden import assert_golden
from support.reference_pages import gpus_page

each = pytest.mark.parametrize("gpu", GPUS.values(), ids=str)


@each
def test_peaks_are_what_the_multiprocessors_can_do(gpu: Gpu) -> None:
    """A multiprocessor does 2^n operations a clock, twice as many in half the width, at most four times in FP4."""
    a_clock = [peak / gpu.multiprocessors / gpu.clock for peak in (gpu.bf16, gpu.fp8, gpu.fp4) if peak]
    powers = [round(log2(rate)) for rate in a_clock]
    assert a_clock == pytest.approx([2.0**power for power in powers], rel=0.015)
    assert [after - before for before, after in pairwise(powers)] in ([], [1], [1, 1], [1, 2])


@each
def test_types_are_those_of_the_target(gpu: Gpu) -> None:
    target = TARGETS[gpu.sm]
    assert (gpu.fp4 is not None) == target.fp4
    assert (gpu.fp8 is not None) == target.fp8
    assert gpu.peak(DType.F4E2M1) == (gpu.fp4 or gpu.bf16)
    assert gpu.peak(DType.F32) == gpu.bf16


@each
def test_what_it_does_with_a_byte_is_plausible(gpu: Gpu) -> None:
    """Memory of a whole number of GB, but for what the driver and error correction keep."""
    assert gpu.bandwidth > 2e11
    assert 50 < gpu.bf16 / gpu.bandwidth < 500
    assert gpu.l2 < gpu.memory / 100
    assert gpu.source


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("NVIDIA GeForce RTX 4060 Ti", "RTX 4060 Ti 16 GB"),
        ("NVIDIA GeForce RTX 4060", "RTX 4060"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA GB10", "DGX Spark"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 5070 Ti", None),
        ("NVIDIA GeForce RTX 5090 Laptop GPU", None),
        ("NVIDIA L40", None),
        ("x86_64", None),
    ],
)
def test_gpus_are_known_by_what_their_driver_calls_them(device: str, name: str | None) -> None:
    found = gpu_named(device)
    assert (found and found.name) == name


def test_the_page_is_that_of_the_table() -> None:
    assert_golden("../../docs/reference/gpus.md", gpus_page())


def test_which_tensorrt_serves_which() -> None:
    assert serving(GPUS["RTX 5090"]) == ("rtx", "full")
    assert serving(GPUS["A100 80 GB SXM"]) == serving(GPUS["H200 SXM"]) == serving(GPUS["B200"]) == ("full",)
    assert {gpu.sm for gpu in served_gpus(flavour="rtx")} == {86, 89, 120, 121}
    assert [gpu.name for gpu in served_gpus((90, 86), "full")] == ["RTX 3060 12 GB", "RTX 3090", "H100 SXM", "H200 SXM"]
    assert served_gpus() == tuple(GPUS.values())
    assert [gpu.memory for gpu in served_gpus()] == sorted(gpu.memory for gpu in GPUS.values())
