"""The audit, on real builds: it passes what is realised and catches what is silently not."""

from __future__ import annotations

from pathlib import Path

import pytest

from n3c.backends.onnx.graph import GraphBuilder
from n3c.backends.onnx.linears import Linear
from n3c.backends.trt.audit import Audit, audit, audit_json
from n3c.backends.trt.build import build_plan
from n3c.backends.trt.layers import Kernel, TensorInfo
from n3c.backends.trt.module import load_trt
from n3c.ir.types import DType

N, K, E, R = 256, 512, 64, 2
"""Rows, columns, experts, chosen experts: enough that a builder does what it does for big ones."""


def realised(graph: GraphBuilder, linear: Linear, folder: Path) -> str:
    """Build `graph` and return what the audit finds for its one linear."""
    import onnx_ir

    data = onnx_ir.to_proto(graph.model("test")).SerializeToString()
    result = build_plan(data, folder / "x.plan", load_trt(), sms=(120,))
    return audit([linear], result.kernels, {"y"}, result.scratch_bytes).findings[0].realised


def weight_only_matmul(format_: str) -> tuple[GraphBuilder, Linear]:
    """The deceptive form: bound FP8 or FP4 weights, dequantized into a BF16 MatMul."""
    g = GraphBuilder("bad")
    x = g.node("Cast", g.input("x", DType.F32, (4, K)), to=16)
    if format_ == "fp8":
        w = g.node("DequantizeLinear", g.input("w", DType.F8E4M3, (N, K)), g.f32(1.0))
    else:
        codes, scale = g.input("w", DType.F4E2M1, (N, K)), g.input("s", DType.F8E4M3, (N, K // 16))
        w = g.node("DequantizeLinear", codes, g.node("DequantizeLinear", scale, g.f32(1.0)), axis=-1, block_size=16)
    wide = g.node("Transpose", g.node("Cast", w, to=16), perm=[1, 0])
    g.output(g.node("Cast", g.node("MatMul", x, wide), to=1), "y", DType.F32, (4, N))
    return g, Linear("l", format_, "w", N * K, N * K, (N, K), 4)


@pytest.mark.parametrize("format_", ["fp8", "nvfp4"])
def test_a_dequantized_copy_is_caught(format_: str, tmp_path: Path) -> None:
    graph, linear = weight_only_matmul(format_)
    assert realised(graph, linear, tmp_path) == "bf16"


def test_a_widened_copy_of_a_bf16_weight_is_caught(tmp_path: Path) -> None:
    g = GraphBuilder("bad")
    wide = g.node("Cast", g.input("w", DType.BF16, (N, K)), to=1)
    y = g.node("MatMul", g.input("x", DType.F32, (4, K)), g.node("Transpose", wide, perm=[1, 0]))
    g.output(y, "y", DType.F32, (4, N))
    assert realised(g, Linear("l", "bf16", "w", N * K, N * K, (N, K), 4), tmp_path) == "fp32"


def test_chosen_experts_that_are_written_out_are_caught(tmp_path: Path) -> None:
    """Gather of dequantized FP4: a kernel of its own when few of many experts are chosen."""
    g = GraphBuilder("bad")
    codes, scale = g.input("w", DType.F4E2M1, (E, N, K)), g.input("s", DType.F8E4M3, (E, N, K // 16))
    w = g.node("DequantizeLinear", codes, g.node("DequantizeLinear", scale, g.f32(1.0)), axis=-1, block_size=16)
    rows = g.node("Gather", w, g.input("i", DType.I64, (1, R)), axis=0)
    y = g.node("ReduceSum", g.node("Mul", rows, g.input("x", DType.F32, (1, 1, 1, K))), g.i64(-1), keepdims=0)
    g.output(y, "y", DType.F32, (1, R, N))
    assert realised(g, Linear("l", "nvfp4", "w", R * N * K, E * N * K, (N, K), 1), tmp_path) == "fp32"


def tensor(name: str, dtype: str, *dims: int) -> TensorInfo:
    return TensorInfo(name, dims, (), dtype)


def kernel(name: str, inputs: list[TensorInfo], outputs: list[TensorInfo]) -> Kernel:
    return Kernel(name, "kgen", "", tuple(inputs), tuple(outputs))


def judge(linear: Linear, *kernels: Kernel) -> tuple[str, str]:
    finding = audit([linear], kernels, {"state.next"}, 0).findings[0]
    return finding.realised, finding.kernel


def test_a_retiled_copy_is_followed_to_who_computes_with_it() -> None:
    linear = Linear("l", "nvfp4", "w", 64 * 32, 64 * 32, (64, 32), 1)
    w, tiled, y = tensor("w", "FP4E2M1", 64, 32), tensor("t", "FP4E2M1", 2, 32, 32), tensor("y", "Float", 1, 64)
    move = kernel("move", [w], [tiled])
    assert judge(linear, move, kernel("gemm", [tiled], [y])) == ("nvfp4", "gemm")
    assert judge(linear, move, kernel("widen", [tiled], [tensor("d", "BFloat16", 64, 32)])) == ("bf16", "widen")


def test_unpacked_bytes_are_a_copy() -> None:
    linear = Linear("l", "nvfp4", "w", 3 * 64 * 32, 8 * 64 * 32, (64, 32), 1)
    w, y = tensor("w", "Int8", 8, 64, 16), tensor("y", "Float", 3, 64)
    assert judge(linear, kernel("k", [w], [y])) == ("nvfp4", "k")
    assert judge(linear, kernel("k", [w], [tensor("i", "Int32", 3, 64, 16)]))[0] == "Int32"
    assert judge(linear, kernel("k", [w], [tensor("d", "Float", 3, 64, 32)]))[0] == "fp32"


def test_a_result_with_as_many_elements_as_the_weight_is_no_copy() -> None:
    """At 32 rows and an input width of 32 the result, [32, 64] or [64, 32], is as large as the weight [64, 32].

    What has the dims of the weight is its result where the kernel reads the input, too; else a copy.
    """
    linear = Linear("l", "bf16", "w", 64 * 32, 64 * 32, (64, 32), 32)
    w = tensor("w", "BFloat16", 64, 32)
    assert judge(linear, kernel("k", [w], [tensor("y", "Float", 32, 1, 64)])) == ("bf16", "k")
    assert judge(linear, kernel("k", [w], [tensor("d", "Float", 64, 32)])) == ("fp32", "k")
    x = tensor("x", "Float", 32, 32)
    assert judge(linear, kernel("k", [w, x], [tensor("y", "Float", 64, 32)])) == ("bf16", "k")
    more = Linear("l", "bf16", "w", 64 * 32, 64 * 32, (64, 32), 33)
    assert judge(more, kernel("k", [w], [tensor("d", "Float", 64, 32)])) == ("fp32", "k")
    assert judge(more, kernel("k", [w], [tensor("d", "Float", 32, 64)])) == ("fp32", "k")


@pytest.mark.parametrize(("dtype", "dims", "realised"), [
    ("Float", (40, 16, 32), "bf16"),  # rows of experts' buckets, of which the kernel takes 32
    ("Float", (640, 16), "fp32"),  # another width: not what the linear reads
    ("Int64", (40, 16, 32), "fp32"),  # places, no numbers
    ("Float", (8, 32), "fp32"),  # fewer rows than the result has
])  # fmt: skip
def test_a_transposed_result_of_rows_that_are_gathered_is_no_copy(
    dtype: str, dims: tuple[int, ...], realised: str
) -> None:
    """[64, 32] of 32 rows has the dims of the weight; its kernel reads the table that the rows come from."""
    linear = Linear("l", "bf16", "w", 64 * 32, 64 * 32, (64, 32), 32)
    w, y = tensor("w", "BFloat16", 64, 32), tensor("y", "Float", 64, 32)
    assert judge(linear, kernel("k", [w, tensor("table", dtype, *dims)], [y])) == (realised, "k")


def test_a_weight_that_nothing_reads_and_states_of_the_same_size() -> None:
    linear = Linear("l", "bf16", "w", 64, 64, (8, 8), 1)
    w = tensor("w", "BFloat16", 8, 8)
    assert judge(linear, kernel("k", [tensor("v", "BFloat16", 8, 8)], [])) == ("none", "")
    assert judge(linear, kernel("k", [w], [tensor("state.next", "Float", 4, 16)])) == ("bf16", "k")


def test_fp8_bound_as_bytes() -> None:
    linear = Linear("l", "fp8", "w", 64 * 32, 64 * 32, (64, 32), 1)
    w = tensor("w", "Int8", 64, 32)
    assert judge(linear, kernel("k", [w], [tensor("y", "Float", 1, 64)])) == ("fp8", "k")
    assert judge(linear, kernel("k", [w], [tensor("d", "Float", 64, 32)])) == ("fp32", "k")


def test_a_copy_that_the_graph_asks_for() -> None:
    linear = Linear("l", "w4a16_nvfp4", "w", 64 * 32, 64 * 32, (64, 32), 48, "bf16")
    w = tensor("w", "FP4E2M1", 64, 32)
    for dtype, ok in (("BFloat16", True), ("Float", False)):
        (finding,) = audit([linear], [kernel("k", [w], [tensor("d", dtype, 64, 32)])], (), 0).findings
        assert finding.ok is ok
    (finding,) = audit([linear], [kernel("k", [w], [tensor("y", "Float", 48, 64)])], (), 0).findings
    assert (finding.realised, finding.ok) == ("w4a16_nvfp4", True)


def test_json_and_diagnostics() -> None:
    w = tensor("w", "FP8", 8, 8)
    linears = [Linear("a", "fp8", "w", 64, 64, (8, 8), 1), Linear("b", "nvfp4", "w", 64, 64, (8, 8), 1)]
    verdict: Audit = audit(linears, [kernel("k", [w], [tensor("y", "Float", 8)])], (), 512)
    data = audit_json({"decode.b1.plan": verdict})
    assert data["linears"][0] == {
        "name": "a",
        "requested": "fp8",
        "expected": "fp8",
        "realised": "fp8",
        "kernel": "k",
        "plan": "decode.b1.plan",
    }
    assert data["summary"] == {"requested": {"fp8": 1, "nvfp4": 1}, "realised": {"fp8": 2}, "mismatches": 1}
    assert data["plans"] == {"decode.b1.plan": {"kernels": 1, "scratch_bytes": 512}}
    (diagnostic,) = verdict.diagnostics()
    assert diagnostic.code == "E0506" and "`b` is nvfp4 but the plan computes it as fp8" in diagnostic.message
