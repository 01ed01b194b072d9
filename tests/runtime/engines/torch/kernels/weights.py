"""Random weights as checkpoints store them, and how far results are from exact ones."""

from __future__ import annotations

import torch
from torch import Tensor

from n3c.runtime.engines.torch.packed import Format, PackedWeight

FORMATS: tuple[Format, ...] = ("bf16", "fp8", "nvfp4")


def random_weight(format: Format, *shape: int, seed: int = 0) -> PackedWeight:
    """Return a weight [..., N, K] that has every finite code, with numbers of about 1 / sqrt(K)."""
    generator = torch.Generator().manual_seed(seed)

    def codes(*dims: int) -> Tensor:
        return torch.randint(0, 256, dims, generator=generator, dtype=torch.uint8)

    stack, size = shape[:-1], shape[-1]
    scale = torch.rand(shape[:-2], generator=generator) + 0.5
    if format == "bf16":
        data = torch.randn(*shape, generator=generator) * size**-0.5
        return PackedWeight(format, data.bfloat16(), None, None, shape)
    if format == "fp8":
        data = codes(*shape)
        data[(data & 0x7F) == 0x7F] = 0  # NaN
        return PackedWeight(format, data, None, scale * size**-0.5 / 150, shape)
    block_scales = torch.randint(0, 127, (*stack, size // 16), generator=generator, dtype=torch.uint8)
    return PackedWeight(format, codes(*stack, size // 2), block_scales, scale * size**-0.5 / 350, shape)


def error(found: Tensor, exact: Tensor) -> float:
    """Return ‖found − exact‖ / ‖exact‖; infinity where a number is not finite, as what was never written is not."""
    if not bool(found.isfinite().all()):
        return float("inf")
    return float((found.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30))
