"""pack: codes as bytes, in a copy."""

from __future__ import annotations

from n3c.ir.printer import print_program
from n3c.ir.types import DType, TensorType
from n3c.passes.renderings.packed import as_bytes, packed
from n3c.passes.serving import serve
from support.specs import QUANTIZED, small_spec

LACKING = (DType.F4E2M1, DType.F8E4M3)


def test_types() -> None:
    assert as_bytes(TensorType(DType.F4E2M1, (3, 8, 32)), LACKING) == TensorType(DType.I8, (3, 8, 16))
    assert as_bytes(TensorType(DType.F8E4M3, (8, 32)), LACKING) == TensorType(DType.I8, (8, 32))
    assert as_bytes(TensorType(DType.F8E4M3, (8, 32)), (DType.F4E2M1,)) == TensorType(DType.F8E4M3, (8, 32))
    assert as_bytes(TensorType(DType.BF16, (8, 32)), LACKING) == TensorType(DType.BF16, (8, 32))


def test_a_copy_with_the_same_bytes() -> None:
    program = serve(small_spec(QUANTIZED)).program
    before = print_program(program)
    made, entry = packed(program, program.entry_points["decode"], LACKING)
    assert print_program(program) == before
    assert {p.type.dtype for p in program.parameters.values()} > {DType.F4E2M1, DType.F8E4M3, DType.I8}
    assert not {made.parameters[name].type.dtype for call in entry.calls for name in call.parameters} & set(LACKING)
    for call in entry.calls:
        formals = made.functions[call.function].parameters
        actual = [made.parameters[name] for name in call.parameters]
        assert [f.type for f in formals] == [p.type for p in actual]
        assert all(p.type.bytes == program.parameters[p.name].type.bytes for p in actual)
    names = [name for call in entry.calls for name in call.parameters]
    codes = next(n for n in names if program.parameters[n].type.dtype is DType.F4E2M1)
    assert str(made.parameters[codes].source) == f"bytes({program.parameters[codes].source})"
