"""Run an entry point of a program op by op."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from n3c.ir.extensions import part
from n3c.ir.program import Call, EntryPoint, Function, Node, Program
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

Evaluator = Callable[..., Any]
"""Takes the operands and attributes of a node, returns its results."""
Choice = Callable[[Program, EntryPoint, Call, Node], Evaluator]
"""Chooses the evaluator of a node in a call of an entry point."""


def by_definition(program: Program, entry: EntryPoint, call: Call, node: Node) -> Evaluator:
    """Return the evaluator that defines the node's op: n3c's, or that of the extension which the op is from."""
    return part(node.op.reference) if node.op.reference else EVALUATORS[node.op.name]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The results of a run: outputs in order, the states after it, and every value between calls."""

    outputs: tuple[Tensor, ...]
    states: dict[str, Tensor]
    values: dict[str, Tensor]


def evaluate(
    program: Program,
    entry_point: str,
    inputs: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    states: Mapping[str, Tensor] | None = None,
    choice: Choice = by_definition,
) -> Evaluation:
    """Evaluate `entry_point` on `inputs`; parameters and states are in their stored types (`TORCH_DTYPES`).

    FP4 codes are uint8 with two elements a byte. Where a parameter requires a gradient, so do the outputs that
    depend on it. Raises KeyError where an input, a parameter or a state is missing.
    """
    entry = program.entry_points[entry_point]
    values = {name: inputs[name] for name in entry.inputs}
    after = dict(states or {})
    for call in entry.calls:
        outputs, following = _evaluate_call(
            program.functions[call.function],
            [values[name] for name in call.inputs],
            [parameters[name] for name in call.parameters],
            [after[name] for name in call.states],
            lambda node, call=call: choice(program, entry, call, node),  # type: ignore[misc]
        )
        values.update(zip(call.outputs, outputs, strict=True))
        after.update(zip(call.states, following, strict=True))
    return Evaluation(tuple(values[name] for name in entry.outputs), after, values)


def _evaluate_call(
    function: Function,
    inputs: list[Tensor],
    parameters: list[Tensor],
    states: list[Tensor],
    evaluator: Callable[[Node], Evaluator],
) -> tuple[list[Tensor], list[Tensor]]:
    """Evaluate one function: its outputs and next states."""
    formals = [*function.inputs, *function.parameters, *function.states]
    known = {id(v): t for v, t in zip(formals, [*inputs, *parameters, *states], strict=True)}
    for node in function.nodes:
        operands = [known[id(v)] if v is not None else None for v in node.operands]
        results = evaluator(node)(*operands, **node.attributes)
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
