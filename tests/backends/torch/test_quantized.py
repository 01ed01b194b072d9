"""What quantized training computes with and stores, against NumPy with the types of ml_dtypes."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ml_dtypes import float4_e2m1fn, float8_e4m3fn
from torch import Tensor, nn

from .generated import imported, tiny_spec, write_generated


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("quantized")
    write_generated(tiny_spec(), folder)
    with imported(folder) as modules:
        yield modules.quantized


def weight_of_many_sizes() -> Tensor:
    """[32, 64]: rows from 1e-7 to 1 times a normal number, and 16 x 16 zeros of both signs."""
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-7, 0, 32)[:, None]
    weight[16:, 16:32] = 0
    weight[16:, 16:24] *= -1
    return weight


def nvfp4_by_numpy(weight: Tensor, rows: int) -> tuple[Any, Any, Any]:
    """Return codes e2m1 [N, K], scales e4m3 [N, K/16], and scale_2."""
    w = weight.numpy()
    blocks = w.reshape(len(w) // rows, rows, -1, 16)
    scale_2 = np.float32(np.abs(w).max()) / np.float32(2688)
    top = np.abs(blocks).max((1, 3))
    scale = np.where(top == 0, 1, (top / (np.float32(6) * scale_2)).clip(2**-9, 448)).astype(float8_e4m3fn)
    scale = scale.repeat(rows, 0)
    step = (scale.astype(np.float32) * scale_2).repeat(16, 1)
    return (w / step + np.float32(0)).clip(-6, 6).astype(float4_e2m1fn), scale, scale_2


@pytest.mark.parametrize("rows", [1, 16])
def test_nvfp4(quantized: Any, rows: int) -> None:
    weight = weight_of_many_sizes()
    codes, scale, scale_2 = nvfp4_by_numpy(weight, rows)
    scales = quantized.scales_of(weight, rows, quantized.largest(weight))
    parts = quantized.parts_of(weight, scales)
    bits = codes.view(np.uint8)
    assert np.array_equal(parts.codes.numpy(), bits[:, ::2] | bits[:, 1::2] << 4)
    assert np.array_equal(parts.scale.view(torch.uint8).numpy(), scale.view(np.uint8))
    assert parts.scale_2.item() == scale_2
    exact = codes.astype(np.float32) * scale.astype(np.float32).repeat(16, 1) * scale_2
    assert np.array_equal(quantized.values(weight, scales).numpy(), exact)


def test_fp8(quantized: Any) -> None:
    weight = weight_of_many_sizes()
    scale = np.float32(weight.abs().max()) / np.float32(448)
    codes = (weight.numpy() / scale).astype(float8_e4m3fn)
    scales = quantized.scales_of(weight, 0, quantized.largest(weight))
    parts = quantized.parts_of(weight, scales)
    assert (parts.scale.item(), parts.scale_2) == (scale, None)
    assert np.array_equal(parts.codes.view(torch.uint8).numpy(), codes.view(np.uint8))
    assert np.array_equal(quantized.values(weight, scales).numpy(), codes.astype(np.float32) * scale)


def test_values_beyond_a_given_scale_are_the_largest(quantized: Any) -> None:
    """As of what a calibrated input has not shown."""
    one, many = torch.tensor(1.0), torch.full((1, 16), 1000.0)
    assert torch.equal(quantized.values(many, (one,)), many.new_full((1, 16), 448))
    assert torch.equal(quantized.values(-many, (one,)), many.new_full((1, 16), -448))
    blocks = torch.ones(1, 1).to(torch.float8_e4m3fn)
    assert torch.equal(quantized.values(-many, (blocks, one)), many.new_full((1, 16), -6))
    assert torch.equal(quantized.parts_of(-many, (one,)).codes.float(), many.new_full((1, 16), -448))


@pytest.mark.parametrize("rows", [0, 1, 16])
def test_zeros(quantized: Any, rows: int) -> None:
    zeros = torch.zeros(16, 32)
    scales = quantized.scales_of(zeros, rows, quantized.largest(zeros))
    assert all((scale.float() == 1).all() for scale in scales)
    assert not quantized.values(zeros, scales).any()
    assert not quantized.parts_of(zeros, scales).codes.view(torch.uint8).any()


def test_experts_have_scales_of_their_own(quantized: Any) -> None:
    weights = torch.stack([weight_of_many_sizes(), 3 * weight_of_many_sizes().roll(1, 1)])
    for rows in (0, 1, 16):
        together = quantized.scales_of(weights, rows, quantized.largest(weights))
        for index, weight in enumerate(weights):
            alone = quantized.scales_of(weight, rows, quantized.largest(weight))
            assert all(torch.equal(a[index].float(), b.float()) for a, b in zip(together, alone, strict=True))
            assert torch.equal(quantized.values(weights, together)[index], quantized.values(weight, alone))


def test_every_number_is_rounded_to_the_nearest_code(quantized: Any) -> None:
    """Ties to the even code, of both signs; steps are 0.5, 1 and 2."""
    x = torch.linspace(-7, 7, 2801)
    expected = x.numpy().clip(-6, 6).astype(float4_e2m1fn).astype(np.float32)
    assert np.array_equal(quantized.e2m1(x).numpy(), expected)


def test_weights_that_share_a_scale_and_those_that_keep_theirs(quantized: Any) -> None:
    """The gradient passes as if nothing were rounded."""
    weight, other = weight_of_many_sizes().requires_grad_(), torch.full((16, 64), 9.0)
    shared = quantized.of_weight(weight, quantized.Format(16, None, False), other)
    scales = quantized.scales_of(weight, 16, torch.tensor(9.0))
    assert torch.equal(shared, quantized.values(weight, scales))
    kept = quantized.of_weight(weight, quantized.Format(16, None, False, scales))
    assert torch.equal(kept, shared)
    (gradient,) = torch.autograd.grad(kept.sum(), weight)
    assert torch.equal(gradient, torch.ones_like(weight))


@pytest.mark.parametrize(("rows", "alike", "found"), [(32, True, 16), (32, False, 1), (24, True, 1)])
def test_blocks_are_of_16_rows_where_all_their_scales_are_alike(
    quantized: Any, rows: int, alike: bool, found: int
) -> None:
    scale = torch.full((rows, 2), 2.0).to(torch.float8_e4m3fn)
    if not alike:
        scale[17, 1] = 1.0
    tensors = {"a.weight_scale": scale, "a.weight_scale_2": torch.tensor(0.5)}
    checkpoint = SimpleNamespace(files=tensors, read=tensors.__getitem__, activations="none", frozen=False)
    assert quantized.Quantized.format_of(checkpoint, "a.weight") == quantized.Format(found, None, False, ())


@pytest.mark.parametrize("sides", [("up",), ("down",), ("up", "down"), ()])
def test_experts_of_which_one_side_is_quantized(quantized: Any, sides: tuple[str, ...]) -> None:
    format_ = quantized.Format(16, None, False)
    config = SimpleNamespace(
        moe_num_experts=2, moe_intermediate_size=4, moe_latent_size=3, initializer_range=1, output_range=1
    )
    model = nn.ModuleDict({"experts": quantized.Experts(config)})

    def stacked(name: str, side: str, count: int) -> Any:
        assert (name, count) == ("experts", 2)
        return format_ if side in sides else None

    found = SimpleNamespace(formats={}, stacked=stacked)
    quantized.Quantized.apply(found, model)
    experts: Any = model["experts"]
    if sides:
        assert experts.formats == tuple(format_ if side in sides else None for side in ("up", "down"))
    assert isinstance(experts, quantized.QuantizedExperts) is bool(sides)


@pytest.mark.parametrize("rows", [0, 16])
@pytest.mark.parametrize("by_row", [False, True])
def test_what_a_linear_reads(quantized: Any, rows: int, by_row: bool) -> None:
    """With the calibrated scale, or by the largest value of each row; blocks of NVFP4 are of one row."""
    x, calibrated = torch.randn(2, 3, 32), torch.tensor(0.01)
    found = quantized.of_input(x, quantized.Format(rows, calibrated, by_row))
    for row, got in zip(x.flatten(0, 1), found.flatten(0, 1), strict=True):
        top = row.abs().max() if by_row else calibrated * (2688 if rows else 448)
        scales = quantized.scales_of(row[None], min(rows, 1), top)
        torch.testing.assert_close(got, quantized.values(row[None], scales)[0], rtol=1e-6, atol=0)
    assert quantized.of_input(x, quantized.Format(rows, None, by_row)) is x
    empty = x[:0]
    assert quantized.of_input(empty, quantized.Format(rows, calibrated, by_row)) is empty
    assert quantized.of_input(x.bfloat16(), quantized.Format(rows, calibrated, by_row)).dtype == torch.bfloat16
