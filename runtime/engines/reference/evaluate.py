"""Run an entry point of a program op by op."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from n3c.ir.program import Function, Program
from n3c.ir.types import DType, TensorType

from .ops import EVALUATORS

TORCH_DTYPES = {
    DType.F32: torch.float32,
    DType.F16: torch.float16,
    DType.BF16: torch.bfloat16,
    DType.F8E4M3: torch.float8_e4m3fn,
    DType.F4E2M1: torch.uint8,  # two codes a byte
    DType.I64: torch.int64,
    DType.I8: torch.int8,
}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a run gave: outputs in order, the states after it, and every value between calls."""

    outputs: tuple[Tensor, ...]
    states: dict[str, Tensor]
    values: dict[str, Tensor]


def evaluate(
    program: Program,
    entry_point: str,
    inputs: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    states: Mapping[str, Tensor] | None = None,
) -> Evaluation:
    """Evaluate `entry_point` on `inputs`; parameters and states are in their stored types (`TORCH_DTYPES`).

    FP4 codes are uint8 with two elements a byte. Raises KeyError where an input, a parameter or a
    state is missing.
    """
    entry = program.entry_points[entry_point]
    values = {name: inputs[name] for name in entry.inputs}
    after = dict(states or {})
    for call in entry.calls:
        function = program.functions[call.function]
        outputs, following = evaluate_function(
            function,
            [values[name] for name in call.inputs],
            [parameters[name] for name in call.parameters],
            [after[name] for name in call.states],
        )
        values.update(zip(call.outputs, outputs, strict=True))
        after.update(zip(call.states, following, strict=True))
    return Evaluation(tuple(values[name] for name in entry.outputs), after, values)


def evaluate_function(
    function: Function, inputs: list[Tensor], parameters: list[Tensor], states: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Evaluate one function: its outputs and next states."""
    formals = [*function.inputs, *function.parameters, *function.states]
    known = {id(v): t for v, t in zip(formals, [*inputs, *parameters, *states], strict=True)}
    with torch.no_grad():
        for node in function.nodes:
            operands = [known[id(v)] if v is not None else None for v in node.operands]
            results = EVALUATORS[node.op.name](*operands, **node.attributes)
            for value, result in zip(node.results, results if isinstance(results, tuple) else (results,), strict=True):
                known[id(value)] = result
    return [known[id(v)] for v in function.outputs], [known[id(v)] for v in function.next_states]


def zero_states(program: Program, batch: int, entry_point: str | None = None) -> dict[str, Tensor]:
    """Return the states of `batch` fresh requests: all, or those that one entry point uses."""
    verify = program.entry_points.get("verify")
    dims = {"B": batch, "S": verify.tokens if verify else 1}
    calls = program.entry_points[entry_point].calls if entry_point else list(program.calls())
    used = {name for call in calls for name in call.states}
    return {name: zeros(state.type.bind(dims)) for name, state in program.states.items() if name in used}


def zeros(type_: TensorType) -> Tensor:
    """Return zeros of a static type."""
    return torch.zeros(type_.static_dims, dtype=TORCH_DTYPES[type_.dtype])
