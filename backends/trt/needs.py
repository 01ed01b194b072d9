"""Needs: the bytes that an entry point must read and write, and those that a kernel moves of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

from n3c.backends.kernel_work import Choice
from n3c.backends.onnx.bindings import Binding, parameter_of
from n3c.backends.onnx.emit import OnnxEntry
from n3c.ir import ops
from n3c.ir.program import EntryPoint, Program
from n3c.ir.types import DType

from .layers import BITS, DYNAMIC, Kernel, TensorInfo

ENDS = "inputs and outputs"
"""Label of what belongs to no call."""


@dataclass(frozen=True, slots=True, eq=False)
class Need:
    """Something that must be moved once, read or written. Compares by identity."""

    label: str
    """That of the call that it belongs to, or `ENDS`."""
    ideal: int
    """Bytes that must be moved."""

    def moved(self, kernel: Kernel, tensor: TensorInfo, context: int) -> int:
        """Return the bytes that `kernel` moves of it, seen as `tensor`; `context` is what an unknown dim counts as."""
        return min(tensor.resolved(context).bytes, self.ideal)


@dataclass(frozen=True, slots=True, eq=False)
class GatheredWeight(Need):
    """Rows of a weight; a kernel that writes as many elements as the whole has reads all of it."""

    elements: int
    choice: Choice | None
    """Of experts; None of rows of the embedding."""

    def moved(self, kernel: Kernel, tensor: TensorInfo, context: int) -> int:
        size = tensor.resolved(context).bytes
        whole = any(output.resolved(context).elements >= self.elements for output in kernel.outputs)
        return size if whole else min(size, self.ideal)


@dataclass(frozen=True, slots=True, eq=False)
class CacheRead(Need):
    """The filled places of a cache."""

    def moved(self, kernel: Kernel, tensor: TensorInfo, context: int) -> int:
        size = tensor.resolved(context).bytes
        if tensor.name in kernel.in_place:
            return 0
        if kernel.dynamic:
            return min(size, self.ideal)
        if not kernel.reduces:  # a gather of rows
            written = sum(output.resolved(context).elements for output in kernel.outputs)
            return min(size, written * BITS[tensor.dtype] // 8)
        return size


@dataclass(frozen=True, slots=True, eq=False)
class CacheWrite(Need):
    """The new tokens in a cache."""

    def moved(self, kernel: Kernel, tensor: TensorInfo, context: int) -> int:
        return self.ideal if tensor.name in kernel.in_place else tensor.resolved(context).bytes


@dataclass(frozen=True, slots=True)
class Needs:
    """The needs of an entry point, by each name that an engine tensor may have: a cache has several."""

    reads: dict[str, Need] = field(default_factory=dict[str, Need])
    writes: dict[str, Need] = field(default_factory=dict[str, Need])


def needs_of(program: Program, entry_point: EntryPoint, entry: OnnxEntry, context: int) -> Needs:
    """Return what `entry`, emitted from `entry_point`, must move where attention sees `context` tokens."""
    needs = Needs()
    labels = {name: call.label for call in reversed(entry_point.calls) for name in (*call.parameters, *call.states)}
    gathered = _gathered(program, entry_point, entry)
    weights: dict[str, Need] = {}
    for binding in entry.weights:
        name = parameter_of(binding.name)  # as it is stored and as bytes it is one memory, to be moved once
        if name not in weights:
            weights[name] = _weight(binding, labels[name], gathered.get(name))
        needs.reads[binding.name] = weights[name]
    for binding in entry.arguments:
        if binding.kind == "view":  # the memory of the state before it, in the type in which it is read
            _alias(needs, binding)
        elif binding.kind == "state" and program.states[binding.name].kind == "kv":
            whole, capacity, tokens = _bytes(binding), binding.shape[2], tokens_of(entry)
            seen = whole * min(max(context, tokens), capacity) // capacity
            needs.reads[binding.name] = CacheRead(labels[binding.name], seen)
            needs.writes[binding.name] = CacheWrite(labels[binding.name], whole * tokens // capacity)
        else:
            needs.reads[binding.name] = Need(labels.get(binding.name, ENDS), _bytes(binding, context))
    for binding in entry.results:
        if isinstance(needs.reads.get(binding.source), CacheRead):  # written in place, it is listed by this name only
            _alias(needs, binding)
        else:
            needs.writes[binding.name] = Need(labels.get(binding.source, ENDS), _bytes(binding))
    return needs


def _alias(needs: Needs, binding: Binding) -> None:
    """Note that `binding` is the memory of the cache that is its source."""
    needs.reads[binding.name] = needs.reads[binding.source]
    needs.writes[binding.name] = needs.writes[binding.source]


def _weight(binding: Binding, label: str, gathered: int | Choice | None) -> Need:
    """Return the need of a weight, of which rows are gathered; None: all of it is read."""
    whole = _bytes(binding)
    if gathered is None:
        return Need(label, whole)
    choice = gathered if isinstance(gathered, Choice) else None
    rows = gathered.distinct if isinstance(gathered, Choice) else gathered
    part = min(whole, round(rows * whole / binding.shape[0]))
    if part < whole and len(binding.shape) > 1:
        return GatheredWeight(label, part, prod(binding.shape), choice)
    return Need(label, part)


_GATHERS = {ops.embedding: ("ids", "table"), ops.expert_linear: ("indices", "weight")}
"""Op → its operands with the rows that are asked for, and what they are gathered from."""


def _gathered(program: Program, entry_point: EntryPoint, entry: OnnxEntry) -> dict[str, int | Choice]:
    """Return how many rows are asked for of parameters that are only ever gathered from, or who chooses them.

    0 of those that a call binds for another entry point's sake: verify writes the drafter's cache, no more.
    """
    dims = {"B": entry.batch, "S": tokens_of(entry)}
    rows: dict[str, int | Choice] = {}
    whole: set[str] = set()
    for call in entry_point.calls:
        function = program.functions[call.function]
        actual = {id(f): name for f, name in zip(function.parameters, call.parameters, strict=True)}
        for node in function.nodes:
            if node.op in ops.DEQUANTIZE:
                continue  # its reader tells
            indices, table = _GATHERS.get(node.op, ("", ""))
            for operand, value in node.named_operands.items():
                names = [actual[id(v)] for v in value.stored if id(v) in actual] if value else []
                if operand == table:
                    asked = node[indices].type.bind(dims)
                    for name in names:
                        before = rows.get(name, 0)
                        if node.op is ops.expert_linear:
                            experts, top_k = node[table].type.static_dims[0], asked.static_dims[-1]
                            rows[name] = Choice(experts, top_k, asked.elements // top_k)
                        elif isinstance(before, int):
                            rows[name] = before + asked.elements
                else:
                    whole.update(names)
    unused = {name for call in entry_point.calls for name in call.parameters} - rows.keys() - whole
    return dict.fromkeys(unused, 0) | {name: count for name, count in rows.items() if name not in whole}


def tokens_of(entry: OnnxEntry) -> int:
    """Return the tokens of a sequence: ids are [B, S], the hidden states that a stage takes [B, S, D]."""
    return next((b.shape[1] for b in entry.arguments if b.kind == "input" and len(b.shape) > 1), 1)


def _bytes(binding: Binding, length: int = 0) -> int:
    """Return the size of a binding, with `length` for a dim that is not known."""
    elements = prod(length if dim == DYNAMIC else dim for dim in binding.shape)
    return (elements * DType(binding.dtype).bits + 7) // 8
