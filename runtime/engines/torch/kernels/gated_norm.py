"""The gated norm of Mamba-2: gate first, then RMSNorm over each of G groups, in float32.

    a = y silu(z),    out = weight a / sqrt(mean over the group (a^2) + eps)       y, z, out [.., G D]

Bytes moved: y, z and the weight read, the output written. One program a row and group.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import begin, overlapping, power_of_two
from .norm import warps_of


@triton.jit
def gated_norm_kernel(y, z, weight, out, WIDTH, GROUP, Y_STRIDE, Z_STRIDE, eps, BLOCK: tl.constexpr):
    """Write group `program_id(1)` of row `program_id(0)`."""
    begin()
    row = tl.program_id(0).to(tl.int64)
    inside = tl.arange(0, BLOCK) < GROUP
    at = tl.program_id(1) * GROUP + tl.arange(0, BLOCK)
    gate = tl.load(z + row * Z_STRIDE + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(y + row * Y_STRIDE + at, mask=inside, other=0.0).to(tl.float32)
    value *= gate / (1.0 + tl.exp(-gate))
    scale = tl.rsqrt(tl.sum(value * value, 0) / GROUP + eps)
    factor = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + at, (value * scale * factor).to(out.dtype.element_ty), mask=inside)


def rows_of(x: Tensor) -> tuple[Tensor, int]:
    """Return x [.., D] as [rows, D] with the numbers of a row side by side, and its stride; a view if possible."""
    rows = x.flatten(0, -2)  # copies where the leading dims are not evenly spaced
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    return rows, rows.stride(0)


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """Return the gated norm [.., G D], of z's type; y and z may be slices of wider rows."""
    width = z.shape[-1]
    (y_rows, y_stride), (z_rows, z_stride) = rows_of(y), rows_of(z)
    out = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    block = power_of_two(width // groups)
    gated_norm_kernel[(len(z_rows), groups)](
        y_rows, z_rows, weight, out, width, width // groups, y_stride, z_stride, eps, block,
        num_warps=warps_of(block), **overlapping(z),
    )  # fmt: skip
    return out
