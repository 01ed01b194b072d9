"""Fake quantization against the packing, bit for bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from n3c.backends.safetensors import nvfp4
from n3c.compiler.quantization.search import fake_quant


def random_matrix(seed: int, rows: int = 32, columns: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator).pow(4)
    w[w.abs() < 0.02] = 0
    return w


@settings(max_examples=30)
@given(st.integers(0, 1 << 16), st.sampled_from([1, 16]), st.sampled_from([1e-30, 1e-3, 1.0, 1e20]))
def test_nvfp4_weights_are_those_of_the_packing(seed: int, block_rows: int, size: float) -> None:
    w = random_matrix(seed) * size
    w[:16, :32] = 0
    packed = nvfp4.dequantize(nvfp4.quantize(w.numpy(), block_rows))
    assert torch.equal(fake_quant.weight(w, "nvfp4", block_rows), torch.from_numpy(packed))


def test_every_tie_rounds_as_the_packing_does() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(2)
    w = torch.stack([ties, -ties])
    assert torch.equal(
        fake_quant.nvfp4(w, 2688.0), torch.from_numpy(nvfp4.dequantize(nvfp4.quantize(w.numpy() * 448, 1))) / 448
    )


@pytest.mark.parametrize("block_rows", [1, 16])
def test_matrices_of_a_stack_have_scales_of_their_own(block_rows: int) -> None:
    stack = torch.stack([random_matrix(0), random_matrix(1) * 1e4])
    whole = fake_quant.weight(stack, "nvfp4", block_rows)
    assert torch.equal(whole[0], fake_quant.weight(stack[0], "nvfp4", block_rows))


def test_fp8_is_scaled_to_the_amax_of_the_tensor() -> None:
    w = random_matrix(3)
    scale = np.float32(np.abs(w.numpy()).max() / np.float32(448))
    expected = (w.numpy() / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    assert np.array_equal(fake_quant.weight(w, "fp8", 1).numpy(), expected)


def test_activations_saturate_at_the_calibrated_amax() -> None:
    x = torch.full((2, 32), 10.0)
    assert torch.equal(fake_quant.activation(x, "fp8", 5.0), torch.full((2, 32), 5.0))
    assert torch.equal(fake_quant.activation(x, "nvfp4", 5.0), torch.full((2, 32), 5.0))
    assert fake_quant.activation(x, "w4a16_nvfp4", 5.0) is x


def test_an_all_zero_tensor_stays_zero() -> None:
    zeros = torch.zeros(16, 32)
    for format_ in ("nvfp4", "fp8", "bf16"):
        assert torch.equal(fake_quant.weight(zeros, format_, 16), zeros)
