"""Products of codes: what is coded, every code against every byte, and the instructions that only a GPU runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from n3c.runtime.engines.torch.activations import Activation
from n3c.runtime.engines.torch.kernels import experts, linear
from n3c.runtime.engines.torch.kernels.coded import BLOCK_OF_PRODUCTS, STEP, can_be_coded, coded
from n3c.runtime.engines.torch.kernels.experts import routed_experts
from n3c.runtime.engines.torch.kernels.tiles import TWO_PRODUCTS
from n3c.runtime.engines.torch.packed import E2M1
from support.ptx import run_ptx

from .test_experts import distinct
from .weights import error, random_weight

NUMBERS = np.array([*E2M1, *(-number for number in E2M1)])
TABLE = 0x03020100
"""What `small_numbers` gives."""


def activation(scale: float = 0.0123) -> Activation:
    return Activation("nvfp4", torch.tensor(scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_the_rounded_numbers(dtype: torch.dtype) -> None:
    x = (torch.randn(5, 96) * 2.0 ** torch.arange(-8.0, 7, 3)[:, None]).to(dtype)
    x[2, 16:32] = 0
    codes, steps, scale = coded(activation(), x)
    numbers = codes.view(5, 6, 16) / 2 * (steps / STEP.value)[..., None] * scale
    torch.testing.assert_close(numbers.view(5, 96), activation().rounded(x.float()), rtol=2e-7, atol=0)


def test_a_nan_is_its_blocks() -> None:
    x = torch.randn(1, 64)
    x[0, 17] = torch.nan
    assert coded(activation(), x).steps.isnan().tolist() == [[False, True, False, False]]
    assert bool(linear.few_rows_linear(x, random_weight("nvfp4", 8, 64), activation=activation()).isnan().all())


def test_instructions_multiply_every_code_in_every_place() -> None:
    random = np.random.default_rng(0)
    codes = random.integers(0, 16, (4096, 16))
    codes[:16] = np.arange(16)[:, None]
    x = random.integers(-12, 13, (4096, 16)).astype(np.int8)
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    words = [(half.astype(np.uint32) << shifts).sum(-1, dtype=np.uint32) for half in np.split(codes, 2, axis=1)]
    fours = [np.ascontiguousarray(part).view("<u4")[:, 0] for part in np.split(x, 4, axis=1)]
    found = run_ptx(BLOCK_OF_PRODUCTS.value, *words, *fours, np.full(4096, TABLE, np.uint32))
    np.testing.assert_array_equal(found.view(np.int32), (2 * NUMBERS[codes] * x).sum(-1))


def test_instructions_scale_both_halves() -> None:
    values = torch.tensor([1.5, -6.0, 0.5, 448.0]).bfloat16()
    pairs = values.repeat(2).view(torch.int32).numpy().view(np.uint32)
    step = np.full(len(pairs), 0.09375, np.float32)
    found = torch.from_numpy(run_ptx(TWO_PRODUCTS.value, pairs, step.view(np.uint32)).view(np.int32))
    assert torch.equal(found.view(torch.bfloat16), (values * 0.09375).repeat(2))


@pytest.mark.parametrize(("outputs", "inputs"), [(17, 1184), (5, 32)])
def test_one_row(outputs: int, inputs: int) -> None:
    """BF16 activations are as exact as float32's: they are rounded once."""
    weight = random_weight("nvfp4", outputs, inputs)
    x = torch.randn(1, inputs).bfloat16()
    exact = activation().rounded(x.float()).double() @ weight.dequantized(torch.float64).T
    y = linear.many_rows_linear(x, weight, activation=activation(), squared_relu=inputs > 32, dtype=torch.float32)
    assert error(y, exact.relu().square() if inputs > 32 else exact) < 2e-6
    assert linear.few_rows_linear(x[:, :32], random_weight("nvfp4", 2, 32), activation=activation()).dtype == x.dtype


@pytest.mark.parametrize("rows", [2, 17, 300])
def test_more_rows_are_rounded_first(rows: int) -> None:
    weight = random_weight("nvfp4", 20, 96)
    x = torch.randn(rows, 96)
    exact = activation().rounded(x).double() @ weight.dequantized(torch.float64).T
    assert error(linear.many_rows_linear(x, weight, activation=activation()), exact) < 2e-6


@pytest.mark.parametrize("tokens", [2, 3])
def test_experts(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 12 experts six pairs are coded, nine are not: with the same results."""
    coded_pairs, calls = experts.coded_pairs, list[int]()

    def noted(*arguments: object) -> None:
        calls.append(1)
        coded_pairs(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(experts, "coded_pairs", noted)
    up, down = random_weight("nvfp4", 12, 32, 32, seed=1), random_weight("nvfp4", 12, 32, 32, seed=2)
    x, chosen, weights = torch.randn(tokens, 32), distinct(tokens, 12, 3), torch.rand(tokens, 3)
    outer, inner = activation(0.01), activation(0.5)
    y = routed_experts(x, chosen, weights, up, down, (outer, inner))
    assert len(calls) == (2 if tokens == 2 else 0)
    ups, downs = up.dequantized(torch.float64), down.dequantized(torch.float64)
    exact = torch.zeros(tokens, 32, dtype=torch.float64)
    for t, row in enumerate(outer.rounded(x).double()):
        for k, e in enumerate(chosen[t].tolist()):
            middle = inner.rounded((ups[e] @ row).relu().square().float()).double()
            exact[t] += weights[t, k].double() * (downs[e] @ middle)
    assert error(y, exact) < 3e-6


def test_what_can_be_coded() -> None:
    weight = random_weight("nvfp4", 4, 64)
    assert can_be_coded(activation(), weight) and can_be_coded(activation(), random_weight("nvfp4", 3, 4, 32))
    assert not can_be_coded(None, weight)
    assert not can_be_coded(activation(), random_weight("nvfp4", 4, 48))  # half a unit at the end
    assert not can_be_coded(Activation("fp8", torch.tensor(1.0)), random_weight("fp8", 4, 64))
