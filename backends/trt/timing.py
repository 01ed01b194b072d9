"""Time of a plan: what its kernels would take on a GPU, what bounds them, and the roofline of the step.

`n3c.backends.kernel_time` predicts each kernel. The roofline is the larger of the least bytes over the bandwidth of the
data sheet and of the least operations over the peak of each weight's format. So a plan is at 1.11 of it at best, before
the first launch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from n3c.backends.gpus import Gpu
from n3c.backends.kernel_time import Bound, duration, parts_of
from n3c.backends.kernel_work import IDLE, Work
from n3c.backends.onnx.emit import OnnxEntry
from n3c.ir.costs import node_flops
from n3c.ir.program import EntryPoint, Parameter, Program
from n3c.ir.types import DType

from .layers import Kernel
from .needs import needs_of, tokens_of
from .traffic import KernelTraffic, Traffic, kind_of
from .work import work_of

_NAMED = 5
"""Ops that a report names."""


@dataclass(frozen=True, slots=True)
class KernelTime:
    """One kernel on one GPU."""

    traffic: KernelTraffic
    work: Work
    seconds: float
    least: float
    """Seconds of the bytes that must be moved and that it is the first to move."""
    bound: Bound


@dataclass(frozen=True, slots=True)
class Time:
    """Of a step, or of what a layer kind does in it; seconds."""

    predicted: float
    memory: float
    """Of the least bytes."""
    products: float
    """Of the least operations."""
    by_bound: Mapping[Bound, float]
    """Bound → what the kernels take that are bound so."""

    @property
    def roofline(self) -> float:
        """The least time."""
        return max(self.memory, self.products)

    def __add__(self, other: Time) -> Time:
        """Return the time of both, one after the other."""
        bounds = {bound: self.by_bound.get(bound, 0.0) + other.by_bound.get(bound, 0.0) for bound in get_args(Bound)}
        return Time(
            self.predicted + other.predicted, self.memory + other.memory, self.products + other.products, bounds
        )

    def as_json(self) -> dict[str, Any]:
        """Return the form of audit.json."""
        return {
            "predicted_us": round(self.predicted * 1e6, 2),
            "roofline_us": round(self.roofline * 1e6, 2),
            "ratio": round(self.predicted / self.roofline, 3) if self.roofline else None,
            "bound_by": max(self.by_bound, key=lambda bound: self.by_bound[bound]) if self.predicted else None,
        }


_NONE = Time(0.0, 0.0, 0.0, {})


@dataclass(frozen=True, slots=True)
class Prediction:
    """The time of a plan, or of the stages of one entry point, on a GPU."""

    total: Time
    by_kind: Mapping[str, Time]
    kernels: tuple[KernelTime, ...]

    def __add__(self, other: Prediction) -> Prediction:
        """Return the time of two stages of one entry point."""
        kinds = dict.fromkeys((*self.by_kind, *other.by_kind))
        by_kind = {kind: self.by_kind.get(kind, _NONE) + other.by_kind.get(kind, _NONE) for kind in kinds}
        return Prediction(self.total + other.total, by_kind, (*self.kernels, *other.kernels))

    def worst(self) -> list[dict[str, Any]]:
        """Return the ops that lose most against their least time, those of all layers of a kind together."""
        groups: dict[tuple[str, str], list[KernelTime]] = {}
        for kernel in self.kernels:
            groups.setdefault((kernel.traffic.kind, f"{kernel.work.form}: {kernel.traffic.op}"), []).append(kernel)
        lost = sorted(groups.items(), key=lambda group: -sum(k.seconds - k.least for k in group[1]))
        return [
            {
                "op": op,
                "kind": kind,
                "layer": max(found, key=lambda k: k.seconds).traffic.layer,
                "kernels": len(found),
                "predicted_us": round(1e6 * sum(k.seconds for k in found), 2),
                "least_us": round(1e6 * sum(k.least for k in found), 2),
                "bound_by": max(found, key=lambda k: k.seconds).bound,
            }
            for (kind, op), found in lost[:_NAMED]
        ]

    def as_json(self) -> dict[str, Any]:
        """Return the form of audit.json."""
        kinds = {kind: time.as_json() for kind, time in self.by_kind.items() if time.predicted}
        return {**self.total.as_json(), "kernels": len(self.kernels), "by_kind": kinds, "worst": self.worst()}


def predict(
    program: Program,
    entry_point: EntryPoint,
    entry: OnnxEntry,
    kernels: Sequence[Kernel],
    moved: Traffic,
    gpus: Iterable[Gpu],
) -> dict[str, Prediction]:
    """Return the time of a plan for each GPU by its name; `kernels` is its listing, of which `moved` is the traffic."""
    needs = needs_of(program, entry_point, entry, moved.context)
    linears = {linear.weight: linear for linear in entry.linears}
    works = [
        work_of(kernel, needs, linears, moved.context, moved=row.moved.bytes, passing=row.passing)
        for kernel, row in zip(kernels, moved.kernels, strict=True)
    ]
    works = [IDLE if kernel.in_loop else work for kernel, work in zip(kernels, works, strict=True)]
    flops = _least_flops(program, entry_point, entry, moved.context)
    return {gpu.name: _on(gpu, moved, works, flops) for gpu in gpus}


def _on(gpu: Gpu, moved: Traffic, works: Sequence[Work], flops: Mapping[str, Mapping[DType, float]]) -> Prediction:
    rows = [_kernel(row, work, gpu) for row, work in zip(moved.kernels, works, strict=True)]
    by_kind = {
        kind: Time(
            0.0,
            least.ideal / gpu.bandwidth,
            sum(count / gpu.peak(dtype) for dtype, count in flops.get(kind, {}).items()),
            {},
        )
        for kind, least in moved.by_kind.items()
    }
    for row in rows:
        took = Time(row.seconds, 0.0, 0.0, {row.bound: row.seconds})
        by_kind[row.traffic.kind] = by_kind.get(row.traffic.kind, _NONE) + took
    return Prediction(sum(by_kind.values(), _NONE), by_kind, tuple(rows))


def _kernel(row: KernelTraffic, work: Work, gpu: Gpu) -> KernelTime:
    seconds, bound = duration(parts_of(work, gpu))
    return KernelTime(row, work, seconds, row.moved.ideal / gpu.bandwidth, bound)


def _least_flops(
    program: Program, entry_point: EntryPoint, entry: OnnxEntry, context: int
) -> dict[str, dict[DType, float]]:
    """Return the operations that the step must do, by layer kind and the type in which its weights are stored."""
    dims = {"B": entry.batch, "S": tokens_of(entry)}
    found: dict[str, dict[DType, float]] = {}
    for call in entry_point.calls:
        counts = found.setdefault(kind_of(program, call.label, call.function), {})
        for node in program.functions[call.function].nodes:
            each = node_flops(node, context)
            if not each:
                continue
            result = node.results[0].type
            static = [dim for dim in result.dims if isinstance(dim, int)]
            rows = result.bind(dims).elements
            for size in static:
                rows //= size
            stored = [program.bound(call, value.stored[0]) for value in node.weights]
            dtype = _product_type(stored[0]) if stored else DType.BF16
            counts[dtype] = counts.get(dtype, 0.0) + each * rows
    return found


def _product_type(parameter: Parameter) -> DType:
    """Return the narrowest type in which a format's products run."""
    return {"nvfp4": DType.F4E2M1, "fp8": DType.F8E4M3}.get(parameter.format, DType.BF16)


def times_json(plans: Mapping[str, Mapping[str, Prediction]], entries: Mapping[str, str]) -> dict[str, Any]:
    """Return `audit.json`, key `time`: entry point and batch size → GPU → time; of `plans`, file → GPU → time."""
    sums: dict[str, dict[str, Prediction]] = {}
    for plan, by_gpu in plans.items():
        found = sums.setdefault(entries[plan], {})
        for gpu, prediction in by_gpu.items():
            found[gpu] = found[gpu] + prediction if gpu in found else prediction
    return {entry: {gpu: found.as_json() for gpu, found in by_gpu.items()} for entry, by_gpu in sums.items()}
