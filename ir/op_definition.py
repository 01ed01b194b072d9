"""What an op is: its name, operands, attributes, shape rule, cost, and the table of all of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from .types import Dim, TensorType

Attribute = int | float | bool | str | tuple[int, ...]
Types = tuple[TensorType, ...]
Flops = Callable[[Mapping[str, TensorType | None], Types, Mapping[str, Attribute]], int]
"""FLOPs of operands by name, results and attributes; a multiply-add is two, symbolic dims count as one."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Continues:
    """What makes an op the one that continues another from a state.

    It has the operands of the other, the state, and `counts` i64 [B]: how many of the tokens count, all where it is
    left out. Its results are that of the other and the state after the tokens that count.
    """

    op: OpDef
    """What begins from a state of zeros."""
    state: str
    """Its operand that is the state, [B, *dims]."""
    kind: Literal["conv", "ssm"]
    """How the state is stored and accounted for: as a window of inputs, or as what a recurrence carries."""
    dims: Callable[[Mapping[str, TensorType | None], Mapping[str, Attribute]], tuple[Dim, ...]]
    """The sizes of the state, of the types of the other's operands by name and its attributes."""


@dataclass(frozen=True, slots=True, eq=False)
class OpDef:
    """An op definition, made by `@op`. Compares by identity."""

    name: str
    doc: str
    operands: tuple[str, ...]
    optional: frozenset[str]
    attributes: tuple[str, ...]
    rule: Callable[..., TensorType | Types]
    weights: tuple[str, ...] = ()
    """Operands that are weights of linears, [..., out, in]: what formats apply to, and what audits follow.

    An op with weights reads the rows that it multiplies as its operand `x`, [B, S, ..., in].
    """
    flops: Flops | None = None
    continues: Continues | None = None
    """For an op that continues another from a state."""
    reference: str | None = None
    """`module:function` of its reference evaluation, for an op of an extension: those of n3c's ops stand in a table."""
    spelling: str | None = None
    """The same of its ONNX spelling."""

    def position(self, operand: str) -> int:
        """Return the place of an operand by its name; KeyError if the op has none of that name."""
        if operand not in self.operands:
            raise KeyError(f"{self.name} has operands {list(self.operands)}, not `{operand}`")
        return self.operands.index(operand)

    def infer(self, operands: Sequence[TensorType | None], attributes: Mapping[str, Attribute]) -> Types:
        """Return the result types; ValueError where the operands or attributes do not fit.

        Optional operands at the end may be left out.
        """
        operands = self.padded(operands)
        if len(operands) != len(self.operands):
            raise ValueError(f"{self.name} takes {len(self.operands)} operands, not {len(operands)}")
        for name, operand in zip(self.operands, operands, strict=True):
            if operand is None and name not in self.optional:
                raise ValueError(f"{self.name} needs operand `{name}`")
        if set(attributes) != set(self.attributes):
            raise ValueError(f"{self.name} has attributes {sorted(self.attributes)}, not {sorted(attributes)}")
        results = self.rule(*operands, **attributes)
        return results if isinstance(results, tuple) else (results,)

    def padded(self, operands: Sequence[T | None]) -> list[T | None]:
        """Return `operands` with None for the optional ones that are left out at the end."""
        missing = self.operands[len(operands) :]
        return [*operands, *(None for name in missing if name in self.optional)]


OPS: dict[str, OpDef] = {}
"""Every op by its name."""
CONTINUED_BY: dict[OpDef, OpDef] = {}
"""Op that looks at earlier tokens → the op that continues it from a state. Attention has caches instead."""


def op(
    *,
    weights: tuple[str, ...] = (),
    flops: Flops | None = None,
    continues: Continues | None = None,
    reference: str | None = None,
    spelling: str | None = None,
) -> Callable[[Callable[..., TensorType | Types]], OpDef]:
    """Define an op by its shape rule; the arguments are fields of its `OpDef`.

    ValueError for a name that another op has.
    """

    def define(rule: Callable[..., TensorType | Types]) -> OpDef:
        parameters = inspect.signature(rule).parameters.values()
        positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        definition = OpDef(
            name=rule.__name__.rstrip("_"),
            doc=inspect.cleandoc(rule.__doc__ or ""),
            operands=tuple(p.name for p in positional),
            optional=frozenset(p.name for p in positional if p.default is None),
            attributes=tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY),
            rule=rule,
            weights=weights,
            flops=flops,
            continues=continues,
            reference=reference,
            spelling=spelling,
        )
        for name in (*weights, "x") if weights else ():
            definition.position(name)
        if definition.name in OPS:
            raise ValueError(f"there is an op `{definition.name}` already")
        OPS[definition.name] = definition
        if continues is not None:
            CONTINUED_BY[continues.op] = definition
        return definition

    return define


def require(condition: bool, message: str) -> None:
    """Raise ValueError with `message` unless `condition` holds, as a shape rule does."""
    if not condition:
        raise ValueError(message)
