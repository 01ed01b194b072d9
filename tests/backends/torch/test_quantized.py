"""What training holds of a weight in a format is what `n3c quantize` stores of it, byte for byte."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from n3c.backends.safetensors import nvfp4
from n3c.backends.safetensors.packing import fp8_scale, largest, pack_fp8_rows

from .generated import imported, tiny_spec, write_generated


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("quantized")
    write_generated(tiny_spec("E*", mtp=None), folder)
    with imported(folder) as modules:
        yield modules.quantized


def normal() -> Tensor:
    return torch.randn(32, 64, generator=torch.Generator().manual_seed(0))


def with_zeros() -> Tensor:
    weight = normal()
    weight[:16, :16], weight[3] = 0.0, -0.0
    return weight


def with_an_outlier() -> Tensor:
    """Other blocks' scales are then below the least that e4m3 holds."""
    weight = normal() * 1e-4
    weight[20, 40] = 1e4
    return weight


def of_ties() -> Tensor:
    """Multiples of a quarter, up to 6 in each block: halfway between two codes."""
    weight = torch.randint(-24, 25, (32, 64), generator=torch.Generator().manual_seed(1)) / 4
    weight[:, ::16] = 6
    return weight


MAKERS: list[Callable[[], Tensor]] = [normal, with_zeros, with_an_outlier, of_ties, lambda: torch.zeros(32, 64)]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("rows", [1, 16])
def test_nvfp4(quantized: Any, make: Callable[[], Tensor], rows: int) -> None:
    """A weight of zeros has scales of 1, and no code is that of -0."""
    weight = make()
    expected = nvfp4.quantize(weight.numpy(), rows)
    scales = quantized.scales_of(weight, rows, quantized.largest(weight))
    parts = quantized.parts_of(weight, scales)
    assert parts.codes.numpy().tobytes() == expected.codes.tobytes()
    assert parts.scale.view(torch.uint8).numpy().tobytes() == expected.scale.tobytes()
    assert parts.scale_2.numpy() == expected.scale_2
    held = quantized.values(weight, scales)
    low, high = parts.codes & 15, parts.codes >> 4
    codes = torch.stack([low, high], -1).flatten(1).long()
    sizes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    numbers = sizes[codes & 7] * torch.where(codes >= 8, -1.0, 1.0)
    step = parts.scale.float().repeat_interleave(16, 1)
    torch.testing.assert_close(held, numbers * step * parts.scale_2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("make", MAKERS)
def test_fp8(quantized: Any, make: Callable[[], Tensor]) -> None:
    weight = make()
    scale = fp8_scale(largest(weight.numpy()))
    expected = pack_fp8_rows(weight.numpy(), scale).codes
    scales = quantized.scales_of(weight, 0, quantized.largest(weight))
    parts = quantized.parts_of(weight, scales)
    assert parts.codes.view(torch.uint8).numpy().tobytes() == expected.tobytes()
    assert parts.scale.numpy() == scale and parts.scale_2 is None
    torch.testing.assert_close(quantized.values(weight, scales), parts.codes.float() * float(scale), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows", [0, 1, 16])
def test_a_stack_has_the_scales_of_its_matrices(quantized: Any, rows: int) -> None:
    stack = torch.stack([make() for make in MAKERS])
    found = quantized.scales_of(stack, rows, quantized.largest(stack))
    alone = [quantized.scales_of(matrix, rows, quantized.largest(matrix)) for matrix in stack]
    for scales, of_each in zip(found, zip(*alone, strict=True), strict=True):
        assert torch.equal(scales.float(), torch.stack([scale.float() for scale in of_each]))


@pytest.mark.parametrize("rows", [0, 1, 16])
def test_the_gradient_passes_as_it_is(quantized: Any, rows: int) -> None:
    """Of a weight, whose scale is that of the larger of those that share it, and of what is read."""
    weight, other = normal().requires_grad_(), 3 * normal()
    format_ = quantized.Format(rows, torch.tensor(0.01), by_row=False)
    held = quantized.of_weight(weight, format_, other)
    top = torch.maximum(quantized.largest(weight), quantized.largest(other))
    assert torch.equal(held, quantized.values(weight, quantized.scales_of(weight, rows, top)))
    held.backward(other)
    assert torch.equal(weight.grad, other)
    x = normal().requires_grad_()
    quantized.of_input(x, format_).backward(other)
    assert torch.equal(x.grad, other)
    nothing = torch.empty(0, 64)
    assert quantized.of_input(nothing, format_) is nothing
    assert quantized.of_input(x, quantized.Format(rows, None, by_row=False)) is x


def test_one_scale_of_what_a_linear_reads(quantized: Any) -> None:
    """The calibrated one, of FP8; of NVFP4 it is that of the blocks' scales."""
    x = normal()
    found = quantized.of_input(x, quantized.Format(0, torch.tensor(0.01), by_row=False))
    codes = (x / 0.01).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    torch.testing.assert_close(found, codes * 0.01, rtol=1e-6, atol=0)
    found = quantized.of_input(x, quantized.Format(1, torch.tensor(0.01), by_row=False))
    expected = nvfp4.quantize(x.numpy(), 1, np.float32(0.01) * np.float32(6 * 448))
    scale = torch.from_numpy(expected.scale.astype(np.float32)).repeat_interleave(16, 1) * float(expected.scale_2)
    assert (found - x).abs().div(scale).max() <= 1 and found.div(scale).abs().max() <= 6 * (1 + 1e-6)
