"""The GPUs that n3c knows by name: what holds a model, what a step costs on each.

Peaks are dense products of the tensor cores that accumulate in float32, as NVIDIA's papers give them: GeForce cards run
those at half the rate of the same chip's professional cards. Memory is what the driver reports (`nvidia-smi`, MiB),
which is neither the name's number nor 2^30 times it. The clock is the one at which the published peaks hold.
`tests/backends/test_gpus.py` compares each peak with multiprocessors x clock x the operations of one a clock.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from n3c.ir.types import DType

MIB = 2**20

_GA102 = "NVIDIA Ampere GA102 GPU Architecture, appendix A"
_ADA = "NVIDIA Ada GPU Architecture, appendix A"
_BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture, appendix A"
_PRO = "NVIDIA RTX Blackwell PRO GPU Architecture, table 1"
_GEFORCE = "NVIDIA's product page; peaks by the rates of the larger cards"


@dataclass(frozen=True, slots=True)
class Gpu:
    """One card. Bytes, bytes a second, Hz, FLOP/s, watts."""

    name: str
    sm: int
    """Compute capability, 10 x major + minor: a key of `backends.trt.targets.TARGETS`, which say what serves it."""
    memory: int
    bandwidth: float
    """Of the memory, by the data sheet; copies reach nine tenths of it."""
    l2: int
    multiprocessors: int
    clock: float
    bf16: float
    fp8: float | None
    """None where the tensor cores do not know the type."""
    fp4: float | None
    watts: int
    """Power of the board; of DGX Spark's chip."""
    source: str

    def peak(self, dtype: DType) -> float:
        """Return the FLOP/s of products of `dtype`; of a type that the tensor cores do not know, those of BF16."""
        return {DType.F4E2M1: self.fp4, DType.F8E4M3: self.fp8}.get(dtype) or self.bf16

    @property
    def issue_slots(self) -> float:
        """Instructions of warps that start in a second: four a clock on each multiprocessor, since Volta."""
        return 4 * self.multiprocessors * self.clock

    def __str__(self) -> str:
        """Return the name."""
        return self.name


def _gpu(
    name: str, sm: int, mib: int, gb_s: float, l2_mib: float, sms: int, mhz: int, tflops: tuple[float, ...], watts: int,
    source: str,
) -> Gpu:  # fmt: skip
    """Return a GPU from the units of data sheets; `tflops` of BF16, FP8 and FP4, as far as there are any."""
    bf16, fp8, fp4 = (*(1e12 * peak for peak in tflops), None, None)[:3]
    assert bf16 is not None
    return Gpu(name, sm, mib * MIB, gb_s * 1e9, round(l2_mib * MIB), sms, mhz * 1e6, bf16, fp8, fp4, watts, source)


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu("RTX 5060", 120, 8_151, 448, 32, 30, 2497, (38.4, 76.7, 306.8), 145, _GEFORCE),
        _gpu("RTX 4060", 89, 8_188, 272, 24, 24, 2460, (30.2, 60.5), 115, _GEFORCE),
        _gpu("RTX 5070", 120, 12_227, 672, 48, 48, 2512, (61.7, 123.5, 493.9), 250, _BLACKWELL),
        _gpu("RTX 4070", 89, 12_282, 504, 36, 46, 2475, (58.3, 116.6), 200, _GEFORCE),
        _gpu("RTX 3060 12 GB", 86, 12_288, 360, 3, 28, 1777, (25.5,), 170, _GEFORCE),
        _gpu("RTX 5080", 120, 16_303, 960, 64, 84, 2617, (112.6, 225.1, 900.4), 360, _BLACKWELL),
        _gpu("RTX 5060 Ti 16 GB", 120, 16_311, 448, 32, 36, 2572, (47.4, 94.8, 379.3), 180, _GEFORCE),
        _gpu("RTX 4060 Ti 16 GB", 89, 16_380, 288, 32, 34, 2535, (44.1, 88.3), 165, _GEFORCE),
        _gpu("L4", 89, 23_034, 300, 48, 58, 2040, (121, 242), 72, "NVIDIA L4 data sheet"),
        _gpu("RTX 4090", 89, 24_564, 1_008, 72, 128, 2520, (165.2, 330.3), 450, _ADA),
        _gpu("RTX 3090", 86, 24_576, 936, 6, 82, 1695, (71,), 350, _GA102),
        _gpu("RTX 5090", 120, 32_607, 1_792, 96, 170, 2407, (209.5, 419, 1_676), 575, _BLACKWELL),
        _gpu("L40S", 89, 46_068, 864, 96, 142, 2520, (362, 733), 350, "NVIDIA L40S data sheet"),
        _gpu("RTX 6000 Ada", 89, 49_140, 960, 96, 142, 2505, (364.2, 728.5), 300, _PRO),
        _gpu("H100 SXM", 90, 81_559, 3_352, 50, 132, 1830, (989.4, 1_978.9), 700, "NVIDIA H100 GPU Architecture"),
        _gpu("A100 80 GB SXM", 80, 81_920, 2_039, 40, 108, 1410, (312,), 400, "NVIDIA A100 data sheet"),
        _gpu("RTX PRO 6000", 120, 97_887, 1_792, 128, 188, 2617, (503.8, 1_007.6, 2_015.2), 600, _PRO),
        # The system shares the memory: about 115 GB of it are free after a start.
        _gpu("DGX Spark", 121, 124_610, 273, 24, 48, 2418, (119, 238, 475), 140,
             "NVIDIA DGX Spark user guide; peaks by the rates of RTX PRO 6000 (there about 1 PFLOP/s, with sparsity)"),
        _gpu("H200 SXM", 90, 143_771, 4_800, 50, 132, 1830, (989.4, 1_978.9), 700, "NVIDIA H200 data sheet"),
        _gpu("B200", 100, 183_359, 7_672, 126.5, 148, 1860, (2_250, 4_500, 9_000), 1_000,
             "NVIDIA HGX B200 data sheet; bandwidth, L2 and multiprocessors as its driver reports them"),
    )
}  # fmt: skip
"""Name → GPU, the smallest memory first."""

_DEVICES = {
    "RTX 3060 12 GB": "RTX 3060",
    "RTX 5060 Ti 16 GB": "RTX 5060 Ti",
    "RTX 4060 Ti 16 GB": "RTX 4060 Ti",
    "H100 SXM": "H100 80GB HBM3",
    "A100 80 GB SXM": "A100-SXM4-80GB",
    "DGX Spark": "GB10",
    "H200 SXM": "H200",
}
"""GPU → what its driver calls it, where that does not contain the name."""


def gpus_of(sms: Collection[int]) -> tuple[Gpu, ...]:
    """Return the known GPUs of these SM versions, the smallest memory first."""
    return tuple(gpu for gpu in GPUS.values() if gpu.sm in sms)


def gpu_named(device: str) -> Gpu | None:
    """Return the known GPU that a driver calls `device`, as `NVIDIA GeForce RTX 5090`; None for any other."""
    for gpu in GPUS.values():
        if re.search(rf"\b{re.escape(_DEVICES.get(gpu.name, gpu.name))}(?! *(Ti|SUPER|Laptop|NVL|D\b))\b", device):
            return gpu
    return None
