"""Linears of stored weights, in Triton's interpreter, against float64."""

from __future__ import annotations

import pytest
import torch

from n3c.runtime.engines.torch.kernels import linear
from n3c.runtime.engines.torch.packed import Format

from .weights import FORMATS, error, random_weight


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"), [(1, 33, 1184), (1, 5, 32), (2, 40, 96), (16, 33, 1184), (5, 3, 16)]
)
def test_few_rows(format: Format, rows: int, outputs: int, inputs: int) -> None:
    weight = random_weight(format, outputs, inputs)
    x = torch.randn(rows, inputs)
    exact = x.double() @ weight.dequantized(torch.float64).T
    assert error(linear.few_rows_linear(x, weight), exact) < 2e-6


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 3])
def test_few_rows_of_bfloat16(format: Format, rows: int) -> None:
    weight = random_weight(format, 24, 160)
    x = torch.randn(rows, 160).bfloat16()
    exact = x.double() @ weight.dequantized(torch.float64).T
    y = linear.few_rows_linear(x, weight)
    assert y.dtype == torch.bfloat16
    assert error(y, exact) < 6e-3  # the interpreter rounds down
    assert error(linear.few_rows_linear(x, weight, dtype=torch.float32), exact) < 2e-6


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 4, 300])
def test_squared_relu(format: Format, rows: int) -> None:
    weight = random_weight(format, 20, 2048)  # four rows: parts of K
    x = torch.randn(rows, 2048)
    exact = (x.double() @ weight.dequantized(torch.float64).T).relu().square()
    assert error(linear.many_rows_linear(x, weight, squared_relu=True), exact) < 4e-6


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [17, 150, 300])
def test_many_rows(format: Format, rows: int) -> None:
    weight = random_weight(format, 70, 208)
    x = torch.randn(rows, 208)
    exact = x.double() @ weight.dequantized(torch.float64).T
    assert error(linear.many_rows_linear(x, weight), exact) < 2e-6


@pytest.mark.parametrize("format", ["bf16", "fp8"])
@pytest.mark.parametrize("rows", [1, 2, 20])
@pytest.mark.parametrize("inputs", [35, 12])
def test_inputs_that_fill_no_word(format: Format, rows: int, inputs: int) -> None:
    weight = random_weight(format, 6, inputs)
    x = torch.randn(rows, inputs)
    exact = x.double() @ weight.dequantized(torch.float64).T
    assert error(linear.many_rows_linear(x, weight), exact) < 2e-6


@pytest.mark.parametrize("format", FORMATS)
def test_every_finite_code(format: Format) -> None:
    """A unit vector picks a column of weights out, to the bit."""
    weight = random_weight(format, 24, 64)
    dense = weight.dequantized(torch.float32)
    for at in (0, 7, 18, 29, 63):
        x = torch.eye(64)[at : at + 1]
        assert torch.equal(linear.few_rows_linear(x, weight)[0], dense[:, at])
    assert torch.equal(linear.many_rows_linear(torch.eye(64), weight), dense.T)
    assert torch.equal(linear.dequantized(weight, torch.float32), dense)


def test_rows_near_the_ends_of_the_range() -> None:
    weight = random_weight("nvfp4", 16, 64)
    for magnitude in (1e-12, 1e12):
        for rows in (1, 3):
            x = torch.randn(rows, 64) * magnitude
            exact = x.double() @ weight.dequantized(torch.float64).T
            assert error(linear.few_rows_linear(x, weight), exact) < 2e-6


@pytest.mark.parametrize(
    ("rows", "inputs", "unit"),
    [(2688, 4096, 32), (10304, 2688, 32), (131072, 2688, 8), (256, 2688, 8), (16128, 1856, 32)],
)
def test_row_blocks_fill_the_card(rows: int, inputs: int, unit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "SMS", 132)
    block, warps = linear.row_blocks(rows, inputs, unit)
    assert -(-rows // block) * warps >= min(rows, 4 * 132)
    if rows > 4096:
        assert -(-inputs // (32 * unit * warps)) * warps * 32 * unit < 1.2 * inputs
