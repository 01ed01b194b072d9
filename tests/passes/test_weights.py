"""Which operand of an op is a weight stands in its definition, and every pass and report asks that."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import n3c.backends.onnx
import n3c.compiler
import n3c.ir
import n3c.passes
import n3c.runtime
from n3c.backends.onnx.entry_forms import LinearForms, fastest_for
from n3c.backends.onnx.linears import linears_of
from n3c.ir import op_definition, ops
from n3c.ir.op_definition import OpDef, op
from n3c.ir.program import Call, EntryPoint, Function, Origin, Parameter, Program, Value
from n3c.ir.rewrite import Builder
from n3c.ir.source import Tensor
from n3c.ir.types import DType, TensorType
from n3c.ir.verify import verify
from n3c.passes.quantize import Quantize, linear_parameters
from n3c.specs.rules import FormatRule, FormatRules

X = TensorType(DType.F32, ("B", "S", 32))


@pytest.fixture
def new_op(monkeypatch: pytest.MonkeyPatch) -> OpDef:
    """An op that no pass has heard of, with a weight under a name of its own."""
    monkeypatch.setattr(op_definition, "OPS", dict(op_definition.OPS))

    @op(weights=("matrix",))
    def shifted_linear(x: TensorType, offset: TensorType, matrix: TensorType) -> TensorType:
        """y = x Wᵀ + offset."""
        return x.with_last(matrix.dims[0])

    return shifted_linear


def program_of(added: OpDef) -> Program:
    offset, matrix = Value("offset", TensorType(DType.BF16, (16,))), Value("m.weight", TensorType(DType.BF16, (16, 32)))
    function = Function("f", "test", [Value("x", X)], [offset, matrix])
    function.outputs = [Builder(function, Origin()).emit(added, function.inputs[0], offset, matrix, name="y")]
    program = Program("new", {"f": function})
    for value in function.parameters:
        program.parameters[value.name] = Parameter(value.name, value.type, value.name, Tensor(value.name), layer=0)
    call = Call("f", "at", ["x"], ["y"], ["offset", "m.weight"], layer=0)
    program.entry_points["run"] = EntryPoint("run", {"x": X}, [call], ["y"])
    verify(program)
    return program


def test_a_new_op_is_quantized_and_audited(new_op: OpDef) -> None:
    program = program_of(new_op)
    assert linear_parameters(program) == {"m.weight"}
    assert Quantize(FormatRules(FormatRule("quantization.format", "nvfp4", 16))).run(program)
    verify(program)
    (function,) = program.functions.values()
    dequantize, node = function.nodes
    assert (dequantize.op, node["matrix"].node) == (ops.dequantize_nvfp4, dequantize)
    assert node["offset"].type.dtype is DType.BF16
    entry, dims = program.entry_points["run"], {"B": 1, "S": 1}
    (linear,) = linears_of(program, entry, dims, LinearForms(program, entry, dims, fastest_for(program)))
    assert (linear.name, linear.requested, linear.shape) == ("m", "nvfp4", (16, 32))


def test_weights_are_operands() -> None:
    with pytest.raises(KeyError, match="not `matrix`"):

        @op(weights=("matrix",))
        def _misspelt(x: TensorType, weight: TensorType) -> TensorType:
            return x

    with pytest.raises(KeyError, match="not `x`"):

        @op(weights=("weight",))
        def _without_rows(rows: TensorType, weight: TensorType) -> TensorType:
            return rows


def test_ops_with_weights() -> None:
    found = {name: op.weights for name, op in op_definition.OPS.items() if op.weights}
    assert found == {"linear": ("weight",), "expert_linear": ("weight",), "experts": ("up", "down")}


def sources() -> Iterator[Path]:
    for package in (n3c.ir, n3c.passes, n3c.backends.onnx, n3c.runtime, n3c.compiler):
        yield from Path(next(iter(package.__path__))).rglob("*.py")


def test_no_module_has_a_list_of_its_own() -> None:
    """No list of operands `weight`, `up`, `down`, and no operand by its position, anywhere."""
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Tuple | ast.List | ast.Set):
                values = {e.value for e in node.elts if isinstance(e, ast.Constant)}
                assert not values >= {"weight", "up", "down"}, f"{path}:{node.lineno}"
            if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute):
                positional = node.value.attr == "operands" and isinstance(node.slice, ast.Constant)
                assert not (positional and isinstance(node.slice.value, int)), f"{path}:{node.lineno}"  # type: ignore[attr-defined]
