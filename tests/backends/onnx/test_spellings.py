"""Each spelling means what the reference evaluation of its op means."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from n3c.backends.onnx.emit import emit_entry
from n3c.backends.onnx.registry import SPELLINGS
from n3c.backends.reference.evaluate import evaluate
from n3c.ir import ops
from n3c.ir.diagnostics import ExitCode, N3CError, Span
from n3c.ir.ops import OPS, Attribute, OpDef
from n3c.ir.program import Call, EntryPoint, Function, Origin, Parameter, Program, State, Value
from n3c.ir.source import Tensor as Source
from n3c.ir.types import DType, TensorType
from n3c.ir.verify import verify
from support.onnx_run import OnnxRunner

F32, BF16, F16, I64 = DType.F32, DType.BF16, DType.F16, DType.I64
STORED = {F32: torch.float32, BF16: torch.bfloat16, F16: torch.float16}


class OneOp:
    """A program that applies one op (behind dequantization, if weights are quantized), and values for it."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.function = Function("f", "test", [], [])
        self.values: dict[str, Tensor] = {}

    def value(self, name: str, dtype: DType, tensor: Tensor, dims: tuple[int, ...] | None = None) -> Value:
        self.values[name] = tensor
        return Value(name, TensorType(dtype, dims or tuple(tensor.shape)))

    def normal(self, *dims: int, dtype: DType = F32) -> Tensor:
        return torch.randn(dims, generator=self.generator).to(STORED[dtype])

    def input(self, name: str, *dims: int) -> Value:
        value = self.value(name, F32, self.normal(*dims))
        self.function.inputs.append(value)
        return value

    def integers(self, name: str, tensor: Tensor) -> Value:
        value = self.value(name, I64, tensor)
        self.function.inputs.append(value)
        return value

    def weight(self, name: str, *dims: int, dtype: DType = F32) -> Value:
        value = self.value(name, dtype, self.normal(*dims, dtype=dtype))
        self.function.parameters.append(value)
        return value

    def state(self, name: str, *dims: int, dtype: DType = F32) -> Value:
        value = self.value(name, dtype, self.normal(*dims, dtype=dtype))
        self.function.states.append(value)
        return value

    def quantized(self, form: str, *dims: int) -> Value:
        """A weight of that form: fp8, nvfp4, packed (nvfp4 as bytes), or the name of a dtype."""
        if form in ("fp8", "nvfp4", "packed"):
            *outer, k = dims
            scales = self.value("scale", F32, torch.rand(dims[:-2], generator=self.generator) + 0.5)
            if form == "fp8":
                codes = self.value("codes", DType.F8E4M3, self.normal(*dims).to(torch.float8_e4m3fn))
                self.function.parameters += [codes, scales]
                return self.function.emit(ops.dequantize_fp8, codes, scales, name="w", origin=Origin())
            packed = torch.randint(0, 256, (*outer, k // 2), generator=self.generator, dtype=torch.uint8)
            codes = (
                self.value("codes", DType.I8, packed.view(torch.int8))
                if form == "packed"
                else self.value("codes", DType.F4E2M1, packed, dims)
            )
            blocks = self.normal(*outer, k // 16).abs().to(torch.float8_e4m3fn)
            block_scales = self.value("block_scale", DType.F8E4M3, blocks)
            self.function.parameters += [codes, block_scales, scales]
            return self.function.emit(ops.dequantize_nvfp4, codes, block_scales, scales, name="w", origin=Origin())
        return self.weight("w", *dims, dtype=DType(form))

    def apply(self, op: OpDef, *operands: Value | None, **attributes: Attribute) -> Program:
        names = [f"r{i}" for i in range(len(op.infer([v.type if v else None for v in operands], attributes)))]
        results = self.function.emit_many(op, operands, names, attributes, origin=Origin())
        kept = len(results) - len(self.function.states)
        self.function.outputs, self.function.next_states = results[:kept], results[kept:]
        return self.program()

    def program(self) -> Program:
        program = Program("one")
        f = program.functions["f"] = self.function
        for p in f.parameters:
            program.parameters[p.name] = Parameter(p.name, p.type, "test", Source(p.name))
        for s in f.states:
            program.states[s.name] = State(s.name, s.type, "test", 0)
        outputs = [f"y{i}" for i in range(len(f.outputs))]
        call = Call("f", "at", [v.name for v in f.inputs], outputs, list(program.parameters), list(program.states))
        program.entry_points["run"] = EntryPoint("run", {v.name: v.type for v in f.inputs}, [call], outputs)
        verify(program)
        return program


def compare(one: OneOp, program: Program, tolerance: float = 2e-6) -> dict[str, Tensor]:
    """Run both evaluations, compare every output and next state, and return those of ONNX."""
    entry = emit_entry(program, "run", batch=1)
    actual = OnnxRunner(entry, one.values).run(one.values)
    of: Mapping[str, Tensor] = one.values
    reference = evaluate(program, "run", of, of, {name: one.values[name] for name in program.states})
    expected = dict(zip(program.entry_points["run"].outputs, reference.outputs, strict=True)) | reference.states
    assert set(actual) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value if value.dtype is torch.int64 else value.float(), rtol=tolerance, atol=tolerance
        )
    return actual


def test_every_op_has_a_spelling_or_is_rewritten_before() -> None:
    assert set(OPS) - set(SPELLINGS) == {"experts", "causal_conv1d", "ssd", "attention"}
    assert set(SPELLINGS) <= set(OPS)


def test_embedding() -> None:
    one = OneOp()
    ids = one.integers("ids", torch.tensor([[3, 0], [6, 6]]))
    compare(one, one.apply(ops.embedding, ids, one.weight("table", 7, 8, dtype=BF16)))


def test_shift_left() -> None:
    one = OneOp()
    ids = one.integers("ids", torch.tensor([[3, 5, 4], [6, 1, 2]]))
    actual = compare(one, one.apply(ops.shift_left, ids))
    assert actual["y0"].tolist() == [[5, 4, 0], [1, 2, 0]]


@pytest.mark.parametrize("op", [ops.add, ops.concat])
def test_two_operands(op: OpDef) -> None:
    one = OneOp()
    compare(one, one.apply(op, one.input("x", 2, 3, 8), one.input("z", 2, 3, 8)))


def test_relu2() -> None:
    one = OneOp()
    compare(one, one.apply(ops.relu2, one.input("x", 2, 3, 8)))


def test_split() -> None:
    one = OneOp()
    compare(one, one.apply(ops.split, one.input("x", 2, 3, 9), sizes=(2, 3, 4)))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_rms_norm(dtype: DType) -> None:
    one = OneOp()
    compare(one, one.apply(ops.rms_norm, one.input("x", 2, 3, 8), one.weight("w", 8, dtype=dtype), eps=0.1))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gated_rms_norm(groups: int) -> None:
    one = OneOp()
    x, gate, weight = one.input("x", 2, 3, 16), one.input("gate", 2, 3, 16), one.weight("w", 16, dtype=BF16)
    compare(one, one.apply(ops.gated_rms_norm, x, gate, weight, groups=groups, eps=0.1))


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("form", ["f32", "bf16", "fp8", "nvfp4"])
def test_linear(form: str, tokens: int) -> None:
    one = OneOp()
    x = one.input("x", 2, tokens, 48)
    compare(one, one.apply(ops.linear, x, one.quantized(form, 5, 48)), tolerance=2e-5)


@pytest.mark.parametrize("rows", [1, 3], ids=["one row for all", "a row an expert"])
@pytest.mark.parametrize("form", ["f32", "bf16", "fp8", "nvfp4", "packed"])
def test_expert_linear(form: str, rows: int) -> None:
    one = OneOp()
    x = one.input("x", 2, 2, rows, 32)
    indices = one.integers("indices", torch.tensor([[[0, 5, 2], [1, 1, 4]], [[3, 0, 5], [5, 4, 3]]]))
    compare(one, one.apply(ops.expert_linear, x, indices, one.quantized(form, 6, 5, 32)), tolerance=2e-5)


def test_packed_codes_cover_every_byte() -> None:
    """Each of the 256 bytes, so each pair of codes, is read right: the sign of the byte is a trap."""
    one = OneOp()
    x = one.input("x", 1, 1, 1, 512)
    indices = one.integers("indices", torch.tensor([[[0]]]))
    weight = one.quantized("packed", 1, 1, 512)
    one.values["codes"] = torch.arange(256, dtype=torch.int64).to(torch.uint8).view(torch.int8).reshape(1, 1, 256)
    compare(one, one.apply(ops.expert_linear, x, indices, weight), tolerance=1e-4)


def test_packed_codes_of_a_plain_linear_are_refused() -> None:
    one = OneOp()
    program = one.apply(ops.linear, one.input("x", 1, 1, 32), one.quantized("packed", 4, 32))
    with pytest.raises(ValueError, match="gathered weights only"):
        emit_entry(program, "run", batch=1)


def test_experts_dispatch() -> None:
    one = OneOp()
    compare(one, one.apply(ops.expand_experts, one.input("x", 2, 3, 8)))
    two = OneOp()
    compare(two, two.apply(ops.combine_experts, two.input("y", 2, 3, 4, 8), two.input("weights", 2, 3, 4)))


@pytest.mark.parametrize(("n_group", "topk_group"), [(1, 1), (4, 2), (4, 1), (2, 1)])
@pytest.mark.parametrize("norm", [True, False])
def test_route(n_group: int, topk_group: int, norm: bool) -> None:
    one = OneOp()
    program = one.apply(
        ops.route,
        one.input("logits", 3, 2, 16),
        one.weight("bias", 16),
        top_k=4,
        n_group=n_group,
        topk_group=topk_group,
        norm_topk_prob=norm,
        scaling_factor=2.5,
    )
    compare(one, program)


@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("bias", [True, False])
def test_causal_conv1d_update(tokens: int, dtype: DType, bias: bool) -> None:
    one = OneOp()
    x, window = one.input("x", 2, tokens, 6), one.state("window", 2, 6, 3, dtype=dtype)
    weight = one.weight("w", 6, 1, 4, dtype=BF16)
    compare(one, one.apply(ops.causal_conv1d_update, x, window, weight, one.weight("b", 6) if bias else None))


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("groups", [1, 2])
def test_ssd_update(tokens: int, dtype: DType, groups: int) -> None:
    one = OneOp()
    x, dt = one.input("x", 2, tokens, 4 * 8), one.input("dt", 2, tokens, 4)
    b, c = one.input("b", 2, tokens, groups * 16), one.input("c", 2, tokens, groups * 16)
    a, d, dt_bias = (one.weight(name, 4) for name in ("a", "d", "dt_bias"))
    one.values["a"] = -one.values["a"].abs()
    state = one.state("state", 2, 4, 8, 16, dtype=dtype)
    program = one.apply(ops.ssd_update, x, dt, a, b, c, d, dt_bias, state, n_groups=groups)
    compare(one, program, tolerance={F32: 1e-5, F16: 2e-3, BF16: 1e-2}[dtype])


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(F32, 2e-6), (BF16, 3e-2)])
def test_cached_attention(tokens: int, dtype: DType, tolerance: float) -> None:
    """Sequences of different lengths. BF16 caches make the engine's queries and probabilities BF16 too."""
    one = OneOp()
    q, k, v = one.input("q", 3, tokens, 4 * 8), one.input("k", 3, tokens, 2 * 8), one.input("v", 3, tokens, 2 * 8)
    caches = [one.state(name, 3, 2, 12, 8, dtype=dtype) for name in ("k_cache", "v_cache")]
    lengths = one.integers("lengths", torch.tensor([0, 5, 12 - tokens]))
    program = one.apply(ops.cached_attention, q, k, v, *caches, lengths, num_heads=4, num_kv_heads=2)
    compare(one, program, tolerance)


def test_an_op_of_training_is_a_located_error() -> None:
    one = OneOp()
    x, weight = one.input("x", 1, 2, 4), one.weight("w", 4, 1, 4)
    span = Span("m.toml", 3, 1)
    y = one.function.emit(ops.causal_conv1d, x, weight, None, name="y", origin=Origin(span))
    one.function.outputs = [y]
    with pytest.raises(N3CError) as caught:
        emit_entry(one.program(), "run", batch=1)
    (diagnostic,) = caught.value.diagnostics
    assert (diagnostic.code, diagnostic.span, caught.value.exit_code) == ("E0507", span, ExitCode.TARGET)
    assert "causal_conv1d" in diagnostic.message


def test_a_cache_in_fp8_is_a_located_error() -> None:
    span = Span("m.toml", 9, 1)
    dims = (1, 2, 4, 8)
    function = Function("f", "test", [], [])
    q, k, v = (Value(name, TensorType(F32, (1, 1, 16))) for name in "qkv")
    caches = [Value(name, TensorType(DType.F8E4M3, dims)) for name in ("k_cache", "v_cache")]
    lengths = Value("lengths", TensorType(I64, (1,)))
    function.inputs, function.states = [q, k, v, lengths], caches
    attributes: dict[str, Attribute] = {"num_heads": 2, "num_kv_heads": 2}
    operands = [q, k, v, *caches, lengths]
    y, *after = function.emit_many(ops.cached_attention, operands, ["y", "k1", "v1"], attributes, origin=Origin(span))
    function.outputs, function.next_states = [y], after
    one = OneOp()
    one.function = function
    with pytest.raises(N3CError) as caught:
        emit_entry(one.program(), "run", batch=1)
    (diagnostic,) = caught.value.diagnostics
    assert (diagnostic.code, diagnostic.span, caught.value.exit_code) == ("E0508", span, ExitCode.TARGET)
