"""Linears over many rows: the products that prefill is made of, with activations quantized as the format says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from n3c.backends.onnx.emit import emit_entry
from n3c.backends.onnx.forms import FEW_ROWS
from n3c.ir import ops
from n3c.ir.types import DType
from n3c.runtime.engines.reference.ops import dequantize_fp8, dequantize_nvfp4
from n3c.runtime.engines.reference.ops import experts as all_experts
from support.one_op import OneOp
from support.onnx_run import FP4DynamicQuantize, OnnxRunner

ROWS = FEW_ROWS + 1


def in_fp4(x: Tensor) -> Tensor:
    """Return x [..., K] as W4A4 sees it: each row scaled to 6 · 448, then E2M1 with E4M3 scales of 16 elements."""
    s = x.abs().amax(-1, keepdim=True).clamp(min=1e-20) * (1 / 2688)
    codes, scale = FP4DynamicQuantize.quantize((x / s).numpy(), 1.0, 16)
    values = torch.from_numpy(codes.astype("float32")).unflatten(-1, (-1, 16))
    scaled: Tensor = values * torch.from_numpy(scale.astype("float32")).unsqueeze(-1)
    return scaled.flatten(-2) * s


def in_fp8(x: Tensor) -> Tensor:
    s = x.abs().amax(-1, keepdim=True).clamp(min=1e-20) * (1 / 448)
    rounded: Tensor = (x / s).to(torch.float8_e4m3fn).float()
    return rounded * s


def same(x: Tensor) -> Tensor:
    return x


def weight(one: OneOp, form: str) -> Tensor:
    if form == "fp8":
        return dequantize_fp8(one.values["codes"], one.values["scale"])
    if form == "nvfp4":
        return dequantize_nvfp4(one.values["codes"], one.values["block_scale"], one.values["scale"])
    return one.values["w"].float()


@pytest.mark.parametrize(
    ("form", "format_", "seen"),
    [
        ("f32", "bf16", same),
        ("bf16", "bf16", same),
        ("fp8", "fp8", in_fp8),
        ("nvfp4", "nvfp4", in_fp4),
        ("nvfp4", "w4a16_nvfp4", same),
    ],
)
def test_linear(form: str, format_: str, seen: Callable[[Tensor], Tensor]) -> None:
    """A row of zeros, one of tiny and one of huge values: each row has a scale of its own."""
    one = OneOp(format_=format_)
    x = one.input("x", 1, ROWS, 48)
    one.values["x"][0, :3] *= torch.tensor([0.0, 1e-6, 1e5])[:, None]
    program = one.apply(ops.linear, x, one.quantized(form, 5, 48))
    actual = OnnxRunner(emit_entry(program, "run", batch=1), one.values).run(one.values)["y0"]
    expected = seen(one.values["x"]) @ weight(one, form).T
    size = expected.abs().amax(-1, keepdim=True).clamp(min=1e-20)
    assert ((actual - expected).abs() / size).max() < 1e-5
    if seen is not same:
        exact = one.values["x"] @ weight(one, form).T
        assert 1e-2 < float((exact - expected).norm() / exact.norm()) < 0.2  # quantization shows, and is no noise


def test_few_rows_keep_activations() -> None:
    one = OneOp(format_="nvfp4")
    program = one.apply(ops.linear, one.input("x", 1, FEW_ROWS, 48), one.quantized("nvfp4", 5, 48))
    actual = OnnxRunner(emit_entry(program, "run", batch=1), one.values).run(one.values)["y0"]
    torch.testing.assert_close(actual, one.values["x"] @ weight(one, "nvfp4").T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["f32", "bf16"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_experts(form: str, tokens: int) -> None:
    """All experts at once, weighted by 0 where one was not chosen."""
    one = OneOp()
    x = one.input("x", 2, tokens, 32)
    indices = one.integers("indices", torch.tensor([[[0, 5]] * tokens, [[3, 1]] * tokens]))
    up, down = one.weight("up", 6, 16, 32, dtype=DType(form)), one.weight("down", 6, 32, 16, dtype=DType(form))
    program = one.apply(ops.experts, x, indices, one.input("weights", 2, tokens, 2), up, down)
    actual = OnnxRunner(emit_entry(program, "run", batch=1), one.values).run(one.values)["y0"]
    v = one.values
    expected = all_experts(v["x"], v["indices"], v["weights"], v["up"], v["down"])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)
