"""Linears over many rows: the products that prefill is made of, with activations quantized as the format says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from n3c.backends.onnx.bindings import BYTES
from n3c.backends.onnx.emit import emit_entry
from n3c.backends.onnx.linear_forms import LinearForm
from n3c.ir import ops
from n3c.ir.types import DType
from n3c.runtime.engines.onnxruntime.session import inference_session
from n3c.runtime.engines.reference.ops import dequantize_fp8, dequantize_nvfp4, rms_norm
from n3c.runtime.engines.reference.ops import experts as all_experts
from support.one_op import OneOp
from support.onnx_run import FP4DynamicQuantize, OnnxRunner

SCALE = 1 / 128


def in_fp4(x: Tensor) -> Tensor:
    """Return x [..., K] as W4A4 sees it: E2M1 with E4M3 scales of 16 elements, times the scale of the tensor."""
    codes, scale = FP4DynamicQuantize.quantize((x * (1 / SCALE)).numpy(), 1.0, 16)
    values = torch.from_numpy(codes.astype("float32")).unflatten(-1, (-1, 16))
    scaled: Tensor = values * torch.from_numpy(scale.astype("float32")).unsqueeze(-1)
    return scaled.flatten(-2) * SCALE


def in_fp8(x: Tensor) -> Tensor:
    rounded: Tensor = (x * (1 / SCALE)).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    return rounded * SCALE


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
@pytest.mark.parametrize(
    ("rows", "chosen", "width"),
    [
        (1, "sum", 48),
        (4, "sum", 48),
        (3, "sum", 512),
        (4, "sum_by_rows", 48),
        (3, "siblings", 48),
        (1, "product", 48),
        (33, "product", 48),
    ],
)
def test_linear(
    rows: int, chosen: LinearForm, width: int, form: str, format_: str, seen: Callable[[Tensor], Tensor]
) -> None:
    """In every form what the format says; values of nothing, tiny, and beyond what the scale reaches."""
    one = OneOp(format_=format_)
    x = one.input("x", 1, rows, width)
    one.values["x"][0, 0, :3] = torch.tensor([0.0, 1e-6, 1e5])
    read = x
    if seen is not same:
        scale = one.value("x_scale", DType.F32, torch.tensor(SCALE))
        one.function.parameters.append(scale)
        read = one.build.emit(ops.quantize_activation, x, scale, name="x_q", format=format_)
    program = one.apply(ops.linear, read, one.quantized(form, 5, width))
    entry = emit_entry(program, "run", batch=1, choose=lambda _: chosen)
    assert any(node.op_type == "Gemm" for node in entry.model.graph) == (chosen == "product")
    bound = {b.name: (b.dtype, b.memory) for b in entry.weights if b.name.endswith(BYTES)}
    decoded = {f"codes{BYTES}": ("i8", program.parameters["codes"].memory)} if form == "nvfp4" else {}
    assert bound == (decoded if (chosen, width) == ("sum", 512) else {})
    actual = OnnxRunner(entry, one.values).run(one.values)["y0"]
    expected = seen(one.values["x"]) @ weight(one, form).T
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    if seen is not same:
        exact = one.values["x"] @ weight(one, form).T
        assert float((exact - expected).norm() / exact.norm()) > 1e-3  # quantization shows


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_siblings_behind_a_norm(dtype: DType) -> None:
    """What divides by the root of the mean of squares stands behind the sums."""
    one = OneOp()
    x = one.input("x", 2, 3, 48)
    normal = one.build.emit(ops.rms_norm, x, one.weight("norm", 48, dtype=DType.BF16), name="normal", eps=1e-5)
    program = one.apply(ops.linear, normal, one.weight("w", 5, 48, dtype=dtype))
    entry = emit_entry(program, "run", batch=2, choose=lambda _: "siblings")
    assert not any(node.op_type == "RMSNormalization" for node in entry.model.graph)
    actual = OnnxRunner(entry, one.values).run(one.values)["y0"]
    v = one.values
    expected = rms_norm(v["x"], v["norm"], eps=1e-5) @ v["w"].float().T
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("format_", "seen"), [("fp8", in_fp8), ("nvfp4", in_fp4)])
def test_rounding_on_a_cpu(format_: str, seen: Callable[[Tensor], Tensor]) -> None:
    """The float32 rendering rounds by float32 arithmetic to the very values, ties and blocks of zeros included."""
    one = OneOp()
    x = one.input("x", 1, 40, 64)
    ties = torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -2.5, -5.0, 4.0, 1.0, 0.5, -6.0])
    one.values["x"][0, 0] = torch.cat([ties, ties * 448, torch.zeros(16), ties * 1e-3]) * SCALE
    scale = one.value("x_scale", DType.F32, torch.tensor(SCALE))
    one.function.parameters.append(scale)
    rounded = one.build.emit(ops.quantize_activation, x, scale, name="x_q", format=format_)
    program = one.apply(ops.linear, rounded, one.weight("w", 64, 64))
    one.values["w"] = torch.eye(64)
    entry = emit_entry(program, "run", batch=1, rendering="float32")
    feeds = {name: one.values[name].numpy() for name in ("x", "x_scale", "w")}
    (actual,) = inference_session(entry.to_bytes()).run(None, feeds)
    torch.testing.assert_close(torch.from_numpy(actual), seen(one.values["x"]), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("form", ["f32", "bf16"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_experts(form: str, tokens: int) -> None:
    """All experts at once, weighted by 0 where one was not chosen."""
    one = OneOp()
    x = one.input("x", 2, tokens, 32)
    indices = one.integers("indices", torch.tensor([[[0, 5]] * tokens, [[3, 1]] * tokens]))
    up, down = one.weight("up", 6, 16, 32, dtype=DType(form)), one.weight("down", 6, 32, 16, dtype=DType(form))
    program = one.apply(ops.experts, x, indices, one.input("weights", 2, tokens, 2), up, down, inner_format="")
    actual = OnnxRunner(emit_entry(program, "run", batch=1), one.values).run(one.values)["y0"]
    v = one.values
    expected = all_experts(v["x"], v["indices"], v["weights"], v["up"], v["down"], inner_format="")
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)
