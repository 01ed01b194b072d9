"""The rounding of activations, in Triton's interpreter, against PyTorch's steps: the same bits."""

from __future__ import annotations

import pytest
import torch

from n3c.runtime.engines.torch.activations import Activation
from n3c.runtime.engines.torch.kernels.rounding import BLOCK, rounded

TIES = torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -2.5, -5.0, 4.0, 1.0, 0.5, -6.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format_", ["fp8", "nvfp4"])
def test_rounded_as_pytorch_does(format_: str, dtype: torch.dtype) -> None:
    """All sizes of numbers, ties, blocks of zeros, what is beyond the scale; a part of a program, and several."""
    generator = torch.Generator().manual_seed(0)
    for scale in (torch.tensor(1 / 128), torch.tensor(0.0123)):
        activation = Activation(format_, scale)
        spread = torch.randn(13, 3 * BLOCK // 16 * 2, generator=generator) * 2.0 ** torch.arange(-20.0, 6, 2)[:, None]
        special = torch.cat([TIES, TIES * 448, torch.zeros(16), TIES * 1e-4, TIES * 1e6, TIES * 2.0**-133]) * scale
        for x in (spread.to(dtype), special.to(dtype), TIES.to(dtype)[None]):
            y, exact = rounded(activation, x), activation.rounded(x)
            if dtype == torch.float32:
                assert torch.equal(y, exact)
            else:  # the interpreter cuts numbers to BF16 where a GPU rounds them
                torch.testing.assert_close(y, exact, rtol=2**-7, atol=0)


def test_nothing_is_rounded_without_a_format_and_nan_stays() -> None:
    x = torch.randn(2, 32)
    assert rounded(None, x) is x
    x[1, 3] = torch.nan
    for format_ in ("fp8", "nvfp4"):
        y = rounded(Activation(format_, torch.tensor(0.01)), x)
        assert y[1, 3].isnan() and y[0].isfinite().all()
