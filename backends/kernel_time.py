"""Time: what a kernel would take on a GPU, by what it does (`n3c.backends.kernel_work`), and what bounds it.

Bytes take the longer of the first two of these times, arithmetic the longest of the next three; of the two the shorter
one hides behind the longer one by half. What it takes to start and to end a kernel comes on top.

memory        bytes that reach DRAM over the bandwidth that a copy reaches: stored values once; what a sum reads again
              for further rows as far as L2 is smaller than it; what kernels leave to each other where it is large
L2            all bytes that pass it, reads for further rows included
instructions  warp instructions over the issue slots of all multiprocessors
L1            wavefronts, one a clock and multiprocessor
products      operations over the share of the tensor cores' peak that large products reach

docs/engine-forms.md has the assumptions and what they were compared with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

from n3c.ir.types import DType

from .gpus import Gpu
from .kernel_work import IDLE, Work

LAUNCH = 3e-6
"""Seconds from the end of one kernel to full speed of the next in a CUDA graph, and its tail: of kernels on an H100."""
MEMORY_SHARE = 0.9
"""Of the bandwidth of the data sheet, that a large copy reaches: 3.03 of 3.35 TB/s on an H100."""
PRODUCT_SHARE = 0.8
"""Of the tensor cores' peak, that large products reach: 785 of 989 TFLOP/s there."""
HIDDEN = 0.5
"""Part of the shorter of bytes and arithmetic that the longer hides: of linears on an H100, in BF16, FP8 and NVFP4."""
_L2_BYTES = {80: 24, 90: 24, 100: 24}
"""SM → bytes of L2 a clock and multiprocessor; 16 on the chips of graphics cards."""

Bound = Literal["memory", "L2", "instructions", "L1", "products", "launch"]
"""What takes most of a kernel's time."""
_ARITHMETIC: tuple[Bound, ...] = ("instructions", "L1", "products")


def parts_of(work: Work, gpu: Gpu) -> dict[Bound, float]:
    """Return the seconds of each of the times of a kernel; none of one that does not run."""
    if work is IDLE:
        return dict.fromkeys(get_args(Bound), 0.0)
    clocks = gpu.multiprocessors * gpu.clock
    through_l2 = work.stored + sum(work.passing) + work.sectors + sum(again.further for again in work.repeated)
    return {
        "memory": from_memory(work, gpu) / (MEMORY_SHARE * gpu.bandwidth),
        "L2": through_l2 / (_L2_BYTES.get(gpu.sm, 16) * clocks),
        "instructions": work.instructions / 32 / gpu.issue_slots,
        "L1": work.wavefronts / 32 / clocks,
        "products": sum(flops / _attainable(gpu, dtype) for dtype, flops in work.flops.items()),
        "launch": LAUNCH,
    }


def _attainable(gpu: Gpu, dtype: DType) -> float:
    """Return the FLOP/s of products: float32 ones run as TF32, at half of BF16's rate."""
    return PRODUCT_SHARE * (gpu.bf16 / 2 if dtype is DType.F32 else gpu.peak(dtype))


def from_memory(work: Work, gpu: Gpu) -> float:
    """Return the bytes that reach DRAM; what kernels leave to each other stays in L2 up to half of that."""
    total = float(work.stored + sum(size for size in work.passing if size > gpu.l2 / 2))
    for again in work.repeated:
        total += again.missed(gpu.l2)
    return total


def duration(parts: Mapping[Bound, float]) -> tuple[float, Bound]:
    """Return how long a kernel takes whose times are `parts`, and which of them is the longest."""
    bytes_, arithmetic = max(parts["memory"], parts["L2"]), max(parts[bound] for bound in _ARITHMETIC)
    shorter, longer = sorted((bytes_, arithmetic))
    return parts["launch"] + longer + (1 - HIDDEN) * shorter, max(parts, key=lambda bound: parts[bound])


def seconds(works: Iterable[Work], gpu: Gpu) -> float:
    """Return how long kernels take one after the other."""
    return sum(duration(parts_of(work, gpu))[0] for work in works)
