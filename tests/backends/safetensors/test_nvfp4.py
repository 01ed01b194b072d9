"""NVFP4 packing, against ModelOpt bit for bit."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from n3c.backends.safetensors import nvfp4

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

modelopt: Any = NVFP4QTensor


def assert_equals_modelopt(weight: torch.Tensor) -> None:
    expected, scale, scale_2 = modelopt.quantize(weight.clone(), 16)
    ours = nvfp4.quantize(weight.float().numpy(), 1)
    np.testing.assert_array_equal(ours.codes, expected._quantized_data.numpy())
    np.testing.assert_array_equal(ours.scale.view(np.uint8), scale.view(torch.uint8).numpy())
    assert ours.scale_2 == np.float32(scale_2.item())


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 40),
    blocks=st.integers(1, 12),
    magnitude=st.integers(-12, 12),
    tail=st.sampled_from([0.0, 1.0, 3.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    zero_block=st.booleans(),
    outlier=st.sampled_from([0.0, 100.0, 1e6]),
)
def test_equals_modelopt(
    seed: int,
    rows: int,
    blocks: int,
    magnitude: int,
    tail: float,
    dtype: torch.dtype,
    zero_block: bool,
    outlier: float,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, blocks * 16, generator=generator)
    weight = weight * weight.abs() ** tail * 10.0**magnitude
    if zero_block:
        weight[0, :16] = 0
    if outlier:
        weight[-1, -1] = weight.abs().max() * outlier
    weight = weight.to(dtype)
    if weight.abs().max() == 0 or not weight.isfinite().all():
        return
    assert_equals_modelopt(weight)


def test_exact_ties_go_to_even_codes() -> None:
    positive = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    ties = torch.cat((positive, -positive))[None]
    codes = nvfp4.e2m1_codes(ties.numpy())
    np.testing.assert_array_equal(codes[0, :8], [0, 2, 2, 4, 4, 6, 6, 7])
    np.testing.assert_array_equal(codes[0, 8:], np.array([0, 2, 2, 4, 4, 6, 6, 7]) | 8)


def test_16x16_blocks_transpose() -> None:
    """A weight and its transpose get the same codes: why training uses two-dimensional blocks."""
    weight = np.random.default_rng(0).normal(size=(64, 96)).astype(np.float32)
    one, other = nvfp4.quantize(weight, 16), nvfp4.quantize(weight.T, 16)
    np.testing.assert_array_equal(nvfp4.unpack(one.codes).T, nvfp4.unpack(other.codes))
    np.testing.assert_array_equal(one.scale[::16].view(np.uint8), one.scale[15::16].view(np.uint8))


def test_all_zero_is_finite() -> None:
    """ModelOpt gives NaN scales here; n3c gives zeros."""
    matrix = nvfp4.quantize(np.zeros((16, 32), np.float32), 16)
    np.testing.assert_array_equal(nvfp4.dequantize(matrix), np.zeros((16, 32), np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    weight = np.ones((16, 16), np.float32)
    weight[3, 5] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        nvfp4.quantize(weight, 1)


@pytest.mark.parametrize(("shape", "rows"), [((16, 24), 1), ((8, 16), 16)])
def test_what_does_not_divide_is_refused(shape: tuple[int, int], rows: int) -> None:
    with pytest.raises(ValueError, match="does not divide"):
        nvfp4.quantize(np.ones(shape, np.float32), rows)


def test_error_of_gaussian_weights() -> None:
    """Relative mean squared error about 0.0090 for 1x16 and 0.0124 for 16x16 blocks."""
    weight = np.random.default_rng(0).normal(size=(512, 1024)).astype(np.float32)
    for rows, expected in ((1, 0.0090), (16, 0.0124)):
        error = nvfp4.dequantize(nvfp4.quantize(weight, rows)) - weight
        assert abs((error**2).sum() / (weight**2).sum() - expected) < 0.0003
