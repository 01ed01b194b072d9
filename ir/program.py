"""Programs: a function for each distinct block, the calls that make a model of them, and their tables.

    Program
      functions     name → Function: SSA over typed values; every layer of one shape shares one
      parameters    name → Parameter: type, role, where it comes from in a checkpoint
      states        name → State: what a request keeps between tokens
      entry_points  name → EntryPoint: the calls in order, each binding parameters and states

Values and nodes compare by identity, types and attributes by value. Passes rewrite functions and
tables in place; `verify` says whether what they left is sound.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .diagnostics import Span
from .formats import as_bytes
from .op_definition import Attribute, OpDef
from .ops import DEQUANTIZE
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

    @property
    def stored(self) -> list[Value]:
        """The values that hold this weight: codes, then scales, where it is dequantized; else itself."""
        if self.node is None or self.node.op not in DEQUANTIZE:
            return [self]
        return [operand for operand in self.node.operands if operand is not None]


@dataclass(slots=True, eq=False)
class Node:
    """One application of an op. An operand is None where an optional one is left out."""

    op: OpDef
    operands: list[Value | None]
    attributes: dict[str, Attribute]
    results: list[Value]
    origin: Origin

    def __getitem__(self, operand: str) -> Value:
        """Return an operand by its name; ValueError where it is left out, KeyError if the op has no such operand."""
        value = self.get(operand)
        if value is None:
            raise ValueError(f"{self.op.name} lacks operand `{operand}`")
        return value

    def get(self, operand: str) -> Value | None:
        """Return an operand by its name, None where it is left out; KeyError if the op has no such operand."""
        return self.operands[self.op.position(operand)]

    @property
    def named_operands(self) -> dict[str, Value | None]:
        """The operands by their names."""
        return dict(zip(self.op.operands, self.operands, strict=True))

    @property
    def weights(self) -> list[Value]:
        """The operands that are weights of linears, as the op's definition says."""
        return [self[name] for name in self.op.weights]


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

    def values(self) -> Iterator[Value]:
        """Yield every value that is defined: inputs, parameters, states, results."""
        yield from self.inputs
        yield from self.parameters
        yield from self.states
        for node in self.nodes:
            yield from node.results

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
        """The key that parameters of the same bytes share: the source, whatever type the bytes are bound as."""
        return str(self.source.operand if isinstance(self.source, Bytes) else self.source)

    def as_bytes(self) -> Parameter:
        """Return the same memory as i8, by `formats.as_bytes`."""
        return replace(self, type=as_bytes(self.type), source=Bytes(self.source))


@dataclass(frozen=True, slots=True)
class State:
    """A tensor that a request keeps between tokens. `B` counts sequences, `S` the pending tokens of a call."""

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

    def needed(self, outputs: Iterable[str]) -> list[Call]:
        """Return the calls that `outputs` depend on, and those that write states, in order."""
        needed, kept = set(outputs), list[Call]()
        for call in reversed(self.calls):
            if call.states or needed.intersection(call.outputs):
                needed.update(call.inputs)
                kept.append(call)
        return kept[::-1]


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

    def as_json(self) -> dict[str, Any]:
        """Return an entry of `ledger` in a manifest, and of `weights` in a report."""
        return {**asdict(self), "shape": list(self.shape)}


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

    def calls(self) -> Iterator[Call]:
        """Yield the calls of every entry point."""
        for entry in self.entry_points.values():
            yield from entry.calls

    def bound(self, call: Call, formal: Value) -> Parameter:
        """Return the parameter that `call` binds to `formal`; ValueError where that is no parameter of its function."""
        return self.parameters[call.parameters[self.functions[call.function].parameters.index(formal)]]

    def extract(self, *entries: EntryPoint) -> Program:
        """Return a program of copies of `entries`, with what they use: passes may rewrite it, this one stays."""
        copies = [
            replace(
                entry,
                inputs=dict(entry.inputs),
                outputs=list(entry.outputs),
                calls=[replace(c, parameters=list(c.parameters), states=list(c.states)) for c in entry.calls],
            )
            for entry in entries
        ]
        calls = [call for entry in copies for call in entry.calls]
        parameters = dict.fromkeys(name for call in calls for name in call.parameters)
        states = {name for call in calls for name in call.states}
        return Program(
            self.name,
            {name: self.functions[name].clone(name) for name in dict.fromkeys(call.function for call in calls)},
            {name: self.parameters[name] for name in parameters},
            {name: state for name, state in self.states.items() if name in states},
            {entry.name: entry for entry in copies},
        )
