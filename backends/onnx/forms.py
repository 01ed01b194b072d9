"""The form of each weight of an entry point, found without emitting anything, for `n3c check`.

Standard library only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from n3c.ir import ops
from n3c.ir.program import EntryPoint, Parameter, Program
from n3c.ir.types import DType

from .entry_forms import LinearForms
from .linear_forms import Choose

_PRODUCTS = {
    "nvfp4": "FP4 x FP4 matrix product",
    "fp8": "FP8 x FP8 matrix product",
    "w4a16_nvfp4": "BF16 matrix product, weights dequantized once a call",
    "bf16": "BF16 matrix product",
}
_NAMES = {DType.F4E2M1: "FP4", DType.F8E4M3: "FP8"}


@dataclass(frozen=True, slots=True)
class Form:
    """How the weights of one format are computed with in one entry point."""

    entry: str
    """`decode`, or `verify.b16` where batch sizes differ."""
    weights: str
    """`linears` or `experts`."""
    format: str
    how: str
    native: bool
    """Whether kernels read the stored type itself; else tables decode its bytes."""

    def as_json(self) -> dict[str, Any]:
        """Return the form of `n3c check --json`."""
        return {
            "entry": self.entry,
            "weights": self.weights,
            "format": self.format,
            "form": self.how,
            "native": self.native,
        }


def batches_of(entry: str, batch_sizes: Iterable[int]) -> tuple[int, ...]:
    """Return the batch sizes for which `entry` is built.

    Prefill is for one sequence: a chunk of it already reads the weights for many tokens, and a sequence of
    a batch is prefilled in its own rows of the states.
    """
    return (1,) if entry == "prefill" else tuple(batch_sizes)


def forms(program: Program, batch_sizes: Iterable[int], lacking: Collection[DType], choose: Choose) -> tuple[Form, ...]:
    """Return the forms of all entry points, in their order, for GPUs that know no type of `lacking`.

    `program` is the one that is served there, and `choose` chooses the forms of linears.
    """
    found: list[Form] = []
    for name, entry in program.entry_points.items():
        by_batch = {
            batch: tuple(dict.fromkeys(_forms(program, entry, batch, lacking, choose)))
            for batch in batches_of(name, batch_sizes)
        }
        alike = len(set(by_batch.values())) == 1
        for batch, rows in list(by_batch.items())[: 1 if alike else None]:
            label = name if alike else f"{name}.b{batch}"
            found.extend(Form(label, *row) for row in sorted(rows))
    return tuple(found)


def _forms(
    program: Program, entry: EntryPoint, batch: int, lacking: Collection[DType], choose: Choose
) -> Iterator[tuple[str, str, str, bool]]:
    linears = LinearForms(program, entry, {"B": batch, "S": entry.tokens}, choose)
    for call in entry.calls:
        for node in program.functions[call.function].nodes:
            for weight in node.weights:
                parameter = program.bound(call, weight.stored[0])
                native = not (parameter.format != "bf16" and _types(parameter) & set(lacking))
                kind = "linears" if node.op is ops.linear else "experts"
                product = linears.is_product(node)
                yield kind, parameter.format, _how(parameter, product, native, lacking), native


def _how(parameter: Parameter, product: bool, native: bool, lacking: Collection[DType]) -> str:
    missing = " and ".join(_NAMES[t] for t in (DType.F4E2M1, DType.F8E4M3) if t in _types(parameter) and t in lacking)
    if not product:
        return "one kernel from the stored values" if native else f"one kernel from bytes, {missing} decoded by tables"
    if native:
        return _PRODUCTS[parameter.format]
    return f"BF16 matrix product, {missing} weights decoded by tables once a call"


def _types(parameter: Parameter) -> set[DType]:
    """Return the types of codes and scales that a format stores."""
    return {"fp8": {DType.F8E4M3}, "bf16": set[DType]()}.get(parameter.format, {DType.F4E2M1, DType.F8E4M3})
