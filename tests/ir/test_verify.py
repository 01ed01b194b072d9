"""The verifier finds what is unsound, and names it."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import pytest

from n3c.ir import ops
from n3c.ir.program import Program
from n3c.ir.rewrite import Builder
from n3c.ir.types import DType, TensorType
from n3c.ir.verify import InvalidProgramError, verify
from n3c.passes.base import BrokenPassError, run_pipeline
from n3c.passes.lower.model import lower
from n3c.passes.serving import serve
from support.specs import small_spec


def use_before_definition(program: Program) -> None:
    nodes = program.functions["mlp"].nodes
    nodes[0], nodes[1] = nodes[1], nodes[0]


def wrong_result_type(program: Program) -> None:
    program.functions["mlp"].nodes[0].results[0].type = TensorType(DType.F32, ("B", "S", 3))


def duplicate_name(program: Program) -> None:
    function = program.functions["mlp"]
    function.nodes[1].results[0].name = function.nodes[0].results[0].name


def misfiled_function(program: Program) -> None:
    program.functions["other"] = program.functions["mlp"]


def unknown_function(program: Program) -> None:
    program.entry_points["forward"].calls[1].function = "nothing"


def too_few_parameters(program: Program) -> None:
    program.entry_points["forward"].calls[1].parameters.pop()


def swapped_parameters(program: Program) -> None:
    program.entry_points["forward"].calls[1].parameters.reverse()


def undefined_output(program: Program) -> None:
    program.entry_points["forward"].outputs.append("nowhere")


def redefined_value(program: Program) -> None:
    program.entry_points["forward"].calls[2].outputs = ["x0"]


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (use_before_definition, "before it is defined"),
        (wrong_result_type, "@mlp: rms_norm gives"),
        (duplicate_name, "defined more than once"),
        (misfiled_function, "@mlp is filed under other"),
        (unknown_function, "backbone.layers.0: no function @nothing"),
        (too_few_parameters, "parameters for"),
        (swapped_parameters, "parameter backbone.layers.0"),
        (undefined_output, "output nowhere is not defined"),
        (redefined_value, "value x0 is defined more than once"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_faults_are_named(spoil: Callable[[Program], None], fault: str) -> None:
    program = lower(small_spec())
    verify(program)
    spoil(program)
    with pytest.raises(InvalidProgramError, match=fault):
        verify(program)


def test_a_state_belongs_to_one_call() -> None:
    program = serve(small_spec()).program
    stateful = [call for call in program.entry_points["decode"].calls if call.function == "mamba2"]
    stateful[1].states = stateful[0].states
    with pytest.raises(InvalidProgramError, match="belongs to another call"):
        verify(program)


def test_the_pipeline_names_the_culprit() -> None:
    class Vandal:
        name: ClassVar[str] = "vandal"

        def run(self, program: Program) -> bool:
            wrong_result_type(program)
            return True

    with pytest.raises(BrokenPassError, match="pass `vandal` left an unsound program"):
        run_pipeline(lower(small_spec()), [Vandal()])


def test_nodes_that_do_not_type_are_refused_when_made() -> None:
    program = lower(small_spec())
    function = program.functions["mlp"]
    with pytest.raises(ValueError, match="does not fit"):
        Builder(function, function.origin).emit(ops.linear, function.inputs[0], function.parameters[0], name="y")
