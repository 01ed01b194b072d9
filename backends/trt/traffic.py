"""Traffic: the bytes that a plan's kernels move, over the bytes that the step must move.

Must: every weight that the entry point uses once, of gathered ones (experts that were chosen, rows of
the embedding) only the rows that are asked for; recurrent and pending states read and written once;
of key and value caches `context` positions read and the new tokens written; inputs and outputs once.

Moved: for each kernel of the builder's listing the tensors that it names, inputs, outputs and
constants, each once a kernel, whole, but for
  gathered weights   the rows that are asked for (each as often as it is chosen, at most the whole),
                     unless the kernel writes as many elements as the whole weight has
  caches             written in place (the same tensor in and out): the new tokens; read by a kernel
                     with a tensor of dynamic length: `context` positions; by one that sums nothing, as
                     a gather of rows: no more than it writes; else the whole capacity
  dynamic lengths    `context`
A tensor of which kernels touch a part only (rows of a merged weight, a cache that is written but not
attended to) must be moved as far as they do.
Nothing is taken off for what a GPU's caches may keep between kernels, so a plan is never better than
this says, except where a kernel reads less of an activation than the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from n3c.backends.onnx.bindings import Binding
from n3c.backends.onnx.emit import OnnxEntry
from n3c.ir import ops
from n3c.ir.program import EntryPoint, Program
from n3c.ir.types import DType

from .layers import BITS, DYNAMIC, Kernel, TensorInfo

_NAMED = 5
"""Kernels that a report names."""


@dataclass(frozen=True, slots=True)
class Moved:
    """What a kernel, a layer kind or a plan moves, and must move, in bytes."""

    bytes: int
    ideal: int

    @property
    def ratio(self) -> float | None:
        """Moved over must; None where nothing must."""
        return self.bytes / self.ideal if self.ideal else None

    def __add__(self, other: Moved) -> Moved:
        """Return the sum of both."""
        return Moved(self.bytes + other.bytes, self.ideal + other.ideal)

    def as_json(self) -> dict[str, Any]:
        """Return the form of audit.json."""
        return {"bytes": self.bytes, "ideal": self.ideal, "ratio": round(self.ratio, 4) if self.ratio else None}


@dataclass(frozen=True, slots=True)
class KernelTraffic:
    """One kernel. Its `ideal` is what it is the first to move of what must be moved."""

    kernel: str
    layer: str
    """Label of the call that it belongs to: the one whose weights and states are most of what it moves."""
    kind: str
    moved: Moved

    @property
    def excess(self) -> int:
        """Bytes that it moves beyond what must be moved."""
        return self.moved.bytes - self.moved.ideal


@dataclass(frozen=True, slots=True)
class Traffic:
    """The traffic of one plan at a context."""

    context: int
    """Tokens of each sequence that attention sees, those of this step included."""
    total: Moved
    by_kind: Mapping[str, Moved]
    """Layer kind (mamba2, moe, …; `mtp.` before those of the drafter) → its share."""
    kernels: tuple[KernelTraffic, ...]

    @property
    def worst(self) -> tuple[KernelTraffic, ...]:
        """The kernels that move most beyond what they must."""
        return tuple(sorted(self.kernels, key=lambda kernel: -kernel.excess)[:_NAMED])

    def __add__(self, other: Traffic) -> Traffic:
        """Return the traffic of two stages of one entry point."""
        kinds = dict.fromkeys((*self.by_kind, *other.by_kind))
        none = Moved(0, 0)
        by_kind = {kind: self.by_kind.get(kind, none) + other.by_kind.get(kind, none) for kind in kinds}
        return Traffic(self.context, self.total + other.total, by_kind, (*self.kernels, *other.kernels))

    def as_json(self) -> dict[str, Any]:
        """Return the form of audit.json."""
        return {
            "context": self.context,
            **self.total.as_json(),
            "by_kind": {kind: moved.as_json() for kind, moved in self.by_kind.items() if moved != Moved(0, 0)},
            "worst": [
                {"kernel": k.kernel, "layer": k.layer, "kind": k.kind, "bytes": k.moved.bytes, "ideal": k.moved.ideal}
                for k in self.worst
            ],
        }


@dataclass(slots=True)
class _Need:
    """A tensor of which a part must be moved: how much, and what a kernel that touches it moves."""

    label: str
    ideal: int
    part: int
    """Bytes that a kernel moves that touches it."""
    elements: int = 0
    """Of a weight that is gathered from: a kernel that writes as many reads all of it."""


@dataclass(slots=True)
class _Needs:
    """What the entry point must read and write, by the names that engine tensors have."""

    read: dict[str, _Need] = field(default_factory=dict[str, _Need])
    written: dict[str, _Need] = field(default_factory=dict[str, _Need])
    caches: dict[str, _Need] = field(default_factory=dict[str, _Need])
    """Caches by both of their names: `part` is `context` positions, `ideal` too."""
    new_tokens: dict[str, _Need] = field(default_factory=dict[str, _Need])
    """Caches by both of their names: `part` is what a step writes."""
    aliases: dict[str, str] = field(default_factory=dict[str, str])
    """Next state → state: a tensor updated in place is listed by the first name only."""


def traffic(
    program: Program, entry_point: EntryPoint, entry: OnnxEntry, kernels: Sequence[Kernel], *, context: int
) -> Traffic:
    """Account `kernels`, the listing of the plan of `entry`, which was emitted from `entry_point`.

    `context` is in tokens; at least those of the step count, at most the capacity of the caches.
    """
    needs = _needs(program, entry_point, entry, context)
    kinds: dict[str, str] = {}
    for call in sorted(entry_point.calls, key=lambda call: call.layer is None):  # the norm after the drafter has the
        kinds.setdefault(call.label, _kind(program, call.label, call.function))  # label of its last block
    left = {(needs.aliases.get(n, n), "read"): need.ideal for n, need in (needs.read | needs.caches).items()}
    left |= {(needs.aliases.get(n, n), "written"): n_.ideal for n, n_ in (needs.written | needs.new_tokens).items()}
    met: set[tuple[str, str]] = set()
    rows = [_account(kernel, needs, left, met, kinds, context) for kernel in kernels]
    by_kind: dict[str, Moved] = dict.fromkeys(kinds.values(), Moved(0, 0))
    for row in rows:
        by_kind[row.kind] = by_kind.get(row.kind, Moved(0, 0)) + row.moved
    for (name, way), size in left.items():
        if size and (name, way) not in met:  # must be moved, and no kernel names it
            need = _need(needs, name, way)
            kind = kinds.get(need.label, need.label)
            by_kind[kind] = by_kind.get(kind, Moved(0, 0)) + Moved(0, size)
    return Traffic(context, sum(by_kind.values(), Moved(0, 0)), by_kind, tuple(rows))


def _need(needs: _Needs, name: str, way: str) -> _Need:
    if way == "read":
        return needs.caches.get(name) or needs.read[name]
    return needs.new_tokens.get(name) or needs.written[name]


def _account(
    kernel: Kernel,
    needs: _Needs,
    left: dict[tuple[str, str], int],
    met: set[tuple[str, str]],
    kinds: Mapping[str, str],
    context: int,
) -> KernelTraffic:
    """Count one kernel, take what it is the first to move out of `left`, and note in `met` what it touches."""
    total = ideal = 0
    shares: dict[str, int] = {label: 0 for label in kernel.labels if label in kinds}
    in_place = {t.name for t in kernel.inputs} & {t.name for t in kernel.outputs}
    bounded = any(t.dynamic for t in (*kernel.inputs, *kernel.outputs))
    written = max((t.resolved(context).elements for t in kernel.outputs), default=0)
    operands = [(t, "read") for t in _distinct(kernel.inputs)] + [(t, "written") for t in _distinct(kernel.outputs)]
    for tensor, way in operands:
        size, need = tensor.resolved(context).bytes, None
        name = needs.aliases.get(tensor.name, tensor.name)
        if tensor.name in needs.caches:
            if tensor.name in in_place and way == "read":
                continue
            need = _need(needs, name, way)
            if way == "written":
                size = need.part if tensor.name in in_place else size
            elif bounded:
                size = min(size, need.part)
            elif not kernel.reduces:
                size = min(size, sum(t.resolved(context).elements for t in kernel.outputs) * BITS[tensor.dtype] // 8)
        elif tensor.name in (needs.read if way == "read" else needs.written):
            name, need = tensor.name, _need(needs, tensor.name, way)
            size = size if 0 < need.elements <= written else min(size, need.part)
        if need is not None:
            if need.label in kinds:
                shares[need.label] = shares.get(need.label, 0) + size
            first = min(left[name, way], size)
            left[name, way] -= first
            met.add((name, way))
            ideal += first
        total += size
    total += sum(t.resolved(context).bytes for t in _distinct(kernel.constants))
    layer = max(shares, key=lambda label: shares[label], default="")
    return KernelTraffic(kernel.name, layer, kinds.get(layer, "other"), Moved(total, ideal))


def _distinct(tensors: Iterable[TensorInfo]) -> list[TensorInfo]:
    """Return the tensors, each name once and with its largest dims: a kernel may read it in several views."""
    found: dict[str, TensorInfo] = {}
    for tensor in tensors:
        if tensor.name not in found or found[tensor.name].elements < tensor.elements:
            found[tensor.name] = tensor
    return list(found.values())


def _kind(program: Program, label: str, function: str) -> str:
    kind = program.functions[function].kind
    return f"mtp.{kind}" if label.startswith("mtp.") and not kind.startswith("mtp") else kind


def _needs(program: Program, entry_point: EntryPoint, entry: OnnxEntry, context: int) -> _Needs:
    needs = _Needs()
    labels = {name: call.label for call in reversed(entry_point.calls) for name in (*call.parameters, *call.states)}
    gathered = _gathered(program, entry_point, entry)
    for binding in entry.weights:
        whole, rows = _bytes(binding), gathered.get(binding.name)
        part = whole if rows is None else min(whole, rows * whole // max(binding.shape[0], 1))
        elements = prod(binding.shape) if part < whole and len(binding.shape) > 1 else 0
        needs.read[binding.name] = _Need(labels[binding.name], part, part, elements)
    tokens = _tokens(entry)
    for binding in entry.arguments:
        if binding.kind == "view":  # the memory of the state before it, in the type in which it is read
            needs.aliases[binding.name] = binding.source
            needs.caches[binding.name] = needs.caches[binding.source]
            continue
        state = program.states.get(binding.name) if binding.kind == "state" else None
        whole = _bytes(binding, context)
        if state is not None and state.kind == "kv":
            capacity = binding.shape[2]
            seen = whole * min(max(context, tokens), capacity) // capacity
            needs.caches[binding.name] = _Need(labels[binding.name], seen, seen)
            added = whole * tokens // capacity
            needs.new_tokens[binding.name] = _Need(labels[binding.name], added, added)
        else:
            label = labels.get(binding.name, "inputs and outputs")
            needs.read[binding.name] = _Need(label, whole, whole)
    for binding in entry.results:
        if binding.kind == "state" and binding.source in needs.caches:
            needs.aliases[binding.name] = binding.source
            needs.caches[binding.name] = needs.caches[binding.source]
            needs.new_tokens[binding.name] = needs.new_tokens[binding.source]
        else:
            label = labels.get(binding.source, "inputs and outputs")
            whole = _bytes(binding)
            needs.written[binding.name] = _Need(label, whole, whole)
    return needs


_GATHERS = {ops.embedding: ("ids", "table"), ops.expert_linear: ("indices", "weight")}
"""Op → its operands with the rows that are asked for, and what they are gathered from."""


def _gathered(program: Program, entry_point: EntryPoint, entry: OnnxEntry) -> dict[str, int]:
    """Return how many rows (experts, tokens) are asked for of parameters that are only ever gathered from.

    0 of those that a call binds for another entry point's sake: verify writes the drafter's cache, no more.
    """
    dims = {"B": entry.batch, "S": _tokens(entry)}
    rows: dict[str, int] = {}
    whole: set[str] = set()
    for call in entry_point.calls:
        function = program.functions[call.function]
        actual = {id(f): name for f, name in zip(function.parameters, call.parameters, strict=True)}
        for node in function.nodes:
            if node.op in ops.DEQUANTIZE:
                continue  # its reader tells
            indices, table = _GATHERS.get(node.op, ("", ""))
            for name, operand in node.named_operands.items():
                names = [actual[id(value)] for value in operand.stored if id(value) in actual] if operand else []
                if name == table:
                    count = node[indices].type.bind(dims).elements
                    rows.update((name, rows.get(name, 0) + count) for name in names)
                else:
                    whole.update(names)
    unused = {name for call in entry_point.calls for name in call.parameters} - rows.keys() - whole
    return dict.fromkeys(unused, 0) | {name: count for name, count in rows.items() if name not in whole}


def _tokens(entry: OnnxEntry) -> int:
    """Return the tokens of a sequence: ids are [B, S], the hidden states that a stage takes [B, S, D]."""
    return next((b.shape[1] for b in entry.arguments if b.kind == "input" and len(b.shape) > 1), 1)


def _bytes(binding: Binding, length: int = 0) -> int:
    """Return the size of a binding, with `length` for a dim that is not known."""
    elements = prod(length if dim == DYNAMIC else dim for dim in binding.shape)
    return (elements * DType(binding.dtype).bits + 7) // 8


def traffic_json(plans: Mapping[str, Traffic], entries: Mapping[str, str]) -> dict[str, Any]:
    """Return `audit.json`, key `traffic`, for plans (file → traffic) of entry points (file → `decode.b1`)."""
    sums: dict[str, Traffic] = {}
    for plan, found in plans.items():
        entry = entries[plan]
        sums[entry] = sums[entry] + found if entry in sums else found
    return {
        "entries": {entry: found.as_json() for entry, found in sums.items()},
        "plans": {plan: found.as_json() for plan, found in plans.items()},
    }
