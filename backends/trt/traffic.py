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
attended to) must be moved as far as they do. Kernels within a Loop count for nothing: no bucket of experts overflows
where a router loads them evenly.
Nothing is taken off for what a GPU's caches may keep between kernels, so a plan is never better than
this says, except where a kernel reads less of an activation than the whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from n3c.backends.onnx.emit import OnnxEntry
from n3c.ir.program import EntryPoint, Program

from .layers import Kernel, TensorInfo
from .needs import Need, Needs, needs_of

_LAYOUT = {"Cast", "Concat", "DequantizeLinear", "Reshape", "Slice", "Split", "Transpose", "Unsqueeze"}
"""ONNX operators that say little about a kernel."""
_NAMED = 5
"""Kernels that a report names."""


@dataclass(frozen=True, slots=True)
class Moved:
    """Bytes that a kernel, a layer kind or a plan moves, and those that it must move."""

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
    """The traffic of one kernel. Of bytes that must be moved, `ideal` counts those that it is the first to move."""

    op: str
    """What it does, for people: the weight or state that is most of what it moves, or its ONNX operators."""
    layer: str
    """Label of the call that it belongs to: the one whose weights and states are most of what it moves."""
    kind: str
    moved: Moved
    passing: tuple[int, ...]
    """Of the bytes moved, those of each tensor that comes from or goes to other kernels, or is a constant."""

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
                {"op": k.op, "layer": k.layer, "kind": k.kind, "bytes": k.moved.bytes, "ideal": k.moved.ideal}
                for k in self.worst
            ],
        }


def traffic(
    program: Program, entry_point: EntryPoint, entry: OnnxEntry, kernels: Sequence[Kernel], *, context: int
) -> Traffic:
    """Account `kernels`, the listing of the plan of `entry`, which was emitted from `entry_point`.

    `context` is in tokens; at least those of the step count, at most the capacity of the caches.
    """
    kinds: dict[str, str] = {}
    for call in sorted(entry_point.calls, key=lambda call: call.layer is None):  # the norm after the drafter has the
        kinds.setdefault(call.label, kind_of(program, call.label, call.function))  # label of its last block
    account = _Account(needs_of(program, entry_point, entry, context), kinds, context)
    rows = [account.kernel(kernel) for kernel in kernels]
    by_kind: dict[str, Moved] = dict.fromkeys(kinds.values(), Moved(0, 0))
    for kind, moved in [*((row.kind, row.moved) for row in rows), *account.untouched()]:
        by_kind[kind] = by_kind.get(kind, Moved(0, 0)) + moved
    return Traffic(context, sum(by_kind.values(), Moved(0, 0)), by_kind, tuple(rows))


class _Account:
    """Counts kernels one after the other."""

    def __init__(self, needs: Needs, kinds: Mapping[str, str], context: int) -> None:
        self.needs, self.kinds, self.context = needs, kinds, context
        self.left = {need: need.ideal for need in (*needs.reads.values(), *needs.writes.values())}
        """Bytes of each need that no kernel so far has moved."""
        self.touched: set[Need] = set()

    def kernel(self, kernel: Kernel) -> KernelTraffic:
        """Return what a kernel moves, and the needed bytes that it is the first to move; within a Loop, nothing."""
        if kernel.in_loop:
            label = next((label for label in kernel.labels if label in self.kinds), "")
            return KernelTraffic("overflow", label, self.kinds.get(label, "other"), Moved(0, 0), ())
        passing = [tensor.resolved(self.context).bytes for tensor in _distinct(kernel.constants)]
        stored = ideal = 0
        largest, named = 0, ""
        shares: dict[str, int] = {label: 0 for label in kernel.labels if label in self.kinds}
        for tensors, needs in ((kernel.inputs, self.needs.reads), (kernel.outputs, self.needs.writes)):
            for tensor in _distinct(tensors):
                need = needs.get(tensor.name)
                if need is None:
                    passing.append(tensor.resolved(self.context).bytes)
                    continue
                size = need.moved(kernel, tensor, self.context)
                stored += size
                if size > largest:
                    largest, named = size, _short(tensor.name, need.label)
                ideal += self.take(need, size)
                if need.label in self.kinds:
                    shares[need.label] = shares.get(need.label, 0) + size
        layer = max(shares, key=lambda label: shares[label], default="")
        return KernelTraffic(
            named if 4 * largest > sum(passing) else ", ".join(sorted(kernel.operators - _LAYOUT)[:3]),
            layer,
            self.kinds.get(layer, "other"),
            Moved(stored + sum(passing), ideal),
            tuple(passing),
        )

    def take(self, need: Need, size: int) -> int:
        """Return how many of `size` bytes no kernel has moved before, and count them as moved."""
        first = min(self.left[need], size)
        self.left[need] -= first
        if size:
            self.touched.add(need)
        return first

    def untouched(self) -> Iterator[tuple[str, Moved]]:
        """Yield kind and bytes of the needs that no kernel names."""
        for need, size in self.left.items():
            if size and need not in self.touched:
                yield self.kinds.get(need.label, need.label), Moved(0, size)


def _distinct(tensors: Iterable[TensorInfo]) -> list[TensorInfo]:
    """Return the tensors, each name once and with its largest dims: a kernel may read it in several views."""
    found: dict[str, TensorInfo] = {}
    for tensor in tensors:
        if tensor.name not in found or found[tensor.name].elements < tensor.elements:
            found[tensor.name] = tensor
    return list(found.values())


def _short(name: str, label: str) -> str:
    """Return the name of a weight or state without that of its layer: `mixer.in_proj`, `k_cache`, `lm_head`."""
    inside = name.removeprefix(f"{label}.") if label.rpartition(".")[2].isdigit() else name
    return re.sub(r"(\.next|\.bytes|\.weight)+$", "", inside)


def kind_of(program: Program, label: str, function: str) -> str:
    """Return the kind of a call for reports: `mtp.` before that of the drafter's blocks."""
    kind = program.functions[function].kind
    return f"mtp.{kind}" if label.startswith("mtp.") and not kind.startswith("mtp") else kind


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
