"""Programs: one function a distinct block, the sequence of calls that makes a model of them, its tables.

    Program
      functions     name → Function: SSA over typed values; every layer of one shape shares one
      parameters    name → Parameter: type, role, where it comes from in a checkpoint
      states        name → State: what a request keeps between tokens
      entry_points  name → EntryPoint: the calls in order, each binding parameters and states

Values and nodes compare by identity, types and attributes by value. Passes rewrite functions and
tables in place; `verify` says whether what they left is sound.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from .diagnostics import Span
from .ops import Attribute, OpDef
from .source import Bytes, Source
from .types import TensorType


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a node comes from: the place in the spec, and the pass that made it."""

    span: Span | None = None
    made_by: str = "lower"

    def by(self, pass_name: str) -> Origin:
        """Return the same place, made by `pass_name`."""
        return Origin(self.span, pass_name)


@dataclass(slots=True, eq=False)
class Value:
    """An SSA value. `node` made it; None for an input, a formal parameter or a formal state."""

    name: str
    type: TensorType
    node: Node | None = None

    def __str__(self) -> str:
        return f"%{self.name}"


@dataclass(slots=True, eq=False)
class Node:
    """One application of an op. An operand is None where an optional one is left out."""

    op: OpDef
    operands: list[Value | None]
    attributes: dict[str, Attribute]
    results: list[Value]
    origin: Origin

    def operand(self, index: int) -> Value:
        """Return a required operand."""
        value = self.operands[index]
        if value is None:
            raise ValueError(f"{self.op.name} lacks operand {self.op.operands[index]}")
        return value


@dataclass(slots=True, eq=False)
class Function:
    """A block. Formal parameters and states are named as the checkpoint names them inside the block.

    A function that continues from states returns, besides its outputs, one next state for each.
    """

    name: str
    kind: str
    """The block kind: mamba2, attention, moe, mlp, embedding, head, mtp_input, mtp_norm."""
    inputs: list[Value]
    parameters: list[Value]
    states: list[Value] = field(default_factory=list[Value])
    nodes: list[Node] = field(default_factory=list[Node])
    outputs: list[Value] = field(default_factory=list[Value])
    next_states: list[Value] = field(default_factory=list[Value])
    origin: Origin = Origin()

    def parameter(self, name: str) -> Value:
        """Return a formal parameter by its name; KeyError if there is none."""
        for value in self.parameters:
            if value.name == name:
                return value
        raise KeyError(name)

    def emit_many(
        self,
        op: OpDef,
        operands: Sequence[Value | None],
        names: Sequence[str],
        attributes: Mapping[str, Attribute] | None = None,
        *,
        origin: Origin,
        at: int | None = None,
    ) -> list[Value]:
        """Append a node, or insert it at `at`, and return its results; ValueError where it does not type."""
        operands = op.padded(operands)
        types = op.infer([v.type if v else None for v in operands], attributes or {})
        if len(types) != len(names):
            raise ValueError(f"{op.name} gives {len(types)} results, not {len(names)}")
        results = [Value(self.fresh(name), type_) for name, type_ in zip(names, types, strict=True)]
        node = Node(op, operands, dict(attributes or {}), results, origin)
        for result in results:
            result.node = node
        self.nodes.insert(len(self.nodes) if at is None else at, node)
        return results

    def emit(self, op: OpDef, *operands: Value | None, name: str, origin: Origin, at: int | None = None) -> Value:
        """`emit_many` for ops with one result and no attributes."""
        return self.emit_many(op, operands, [name], origin=origin, at=at)[0]

    def values(self) -> Iterator[Value]:
        """Yield every value that is defined: inputs, parameters, states, results."""
        yield from self.inputs
        yield from self.parameters
        yield from self.states
        for node in self.nodes:
            yield from node.results

    def fresh(self, name: str) -> str:
        """Return `name`, with a number behind it where it is taken."""
        taken = {value.name for value in self.values()}
        candidate, n = name, 1
        while candidate in taken:
            candidate, n = f"{name}_{n}", n + 1
        return candidate

    def uses(self, value: Value) -> list[Node]:
        """Return the nodes that read `value`."""
        return [node for node in self.nodes if any(v is value for v in node.operands)]

    def replace(self, old: Value, new: Value) -> None:
        """Make every reader of `old` read `new`."""
        for node in self.nodes:
            node.operands = [new if v is old else v for v in node.operands]
        self.outputs = [new if v is old else v for v in self.outputs]
        self.next_states = [new if v is old else v for v in self.next_states]

    def clone(self, name: str) -> Function:
        """Return a deep copy under another name."""
        mapping: dict[int, Value] = {}

        def copy(values: Iterable[Value]) -> list[Value]:
            return [mapping.setdefault(id(v), Value(v.name, v.type)) for v in values]

        twin = Function(
            name, self.kind, copy(self.inputs), copy(self.parameters), copy(self.states), origin=self.origin
        )
        for node in self.nodes:
            operands = [mapping[id(v)] if v is not None else None for v in node.operands]
            made = Node(node.op, operands, dict(node.attributes), copy(node.results), node.origin)
            for result in made.results:
                result.node = made
            twin.nodes.append(made)
        twin.outputs, twin.next_states = copy(self.outputs), copy(self.next_states)
        return twin


@dataclass(frozen=True, slots=True)
class Parameter:
    """A weight of the program. Frozen: a pass that changes one replaces it."""

    name: str
    """Its name in the program: that of the checkpoint, `experts.*` where experts are stacked."""
    type: TensorType
    role: str
    source: Source
    layer: int | None = None
    """Index of its block in the pattern (MTP blocks count on from the end); None at the ends of the model."""
    buffer: bool = False
    """Whether the field's parameter counts leave it out: the router's correction bias."""
    format: str = "bf16"
    """The format that the spec asks for: bf16, fp8, nvfp4 or w4a16_nvfp4."""
    origin: Origin = Origin()

    @property
    def memory(self) -> str:
        """What tells parameters of the same bytes: the source, whatever type the bytes are bound as."""
        return str(self.source.operand if isinstance(self.source, Bytes) else self.source)


@dataclass(frozen=True, slots=True)
class State:
    """What a request keeps between tokens. The dim `B` counts sequences, `S` the tokens of a call that wait."""

    name: str
    type: TensorType
    kind: str
    """`kv`, `conv`, `ssm`, or `pending`: operands of tokens that are not accepted yet."""
    layer: int


@dataclass(slots=True, eq=False)
class Call:
    """One function applied: actual names for its inputs, parameters and states, in its order."""

    function: str
    label: str
    """Where in the model: `backbone.layers.3`, `lm_head`, `mtp.layers.0`."""
    inputs: list[str]
    outputs: list[str]
    parameters: list[str]
    states: list[str] = field(default_factory=list[str])
    layer: int | None = None
    origin: Origin = Origin()


@dataclass(slots=True, eq=False)
class EntryPoint:
    """A sequence of calls over named values: `inputs` and what earlier calls gave."""

    name: str
    inputs: dict[str, TensorType]
    calls: list[Call]
    outputs: list[str]
    tokens: int = 1
    """Tokens of each sequence that a call takes when it serves: the size of dim `S`."""


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """Why a weight has its format: one line of the coverage ledger."""

    name: str
    role: str
    shape: tuple[int, ...]
    rule: str
    """The deciding rule: `quantization.rules.2`, `quantization.format`, or why none applies."""
    format: str
    bytes: int
    """With its scales."""


@dataclass(slots=True, eq=False)
class Program:
    """A whole model."""

    name: str
    functions: dict[str, Function] = field(default_factory=dict[str, Function])
    parameters: dict[str, Parameter] = field(default_factory=dict[str, Parameter])
    states: dict[str, State] = field(default_factory=dict[str, State])
    entry_points: dict[str, EntryPoint] = field(default_factory=dict[str, EntryPoint])
    ledger: tuple[LedgerEntry, ...] = ()
    """Filled by the pass `quantize`: every weight once."""

    def memories(self) -> Iterator[Parameter]:
        """Yield the parameters, but of several that are the same bytes in different types the first only."""
        yield from {p.memory: p for p in reversed(self.parameters.values())}.values()

    def calls(self) -> Iterator[Call]:
        """Yield the calls of every entry point."""
        for entry in self.entry_points.values():
            yield from entry.calls
