"""The audit: for each linear, the precision that was asked for and the one that the plan realises.

A builder may accept a graph of FP8 weights and yet write a BF16 copy of them at every call. So the
verdict comes from the compiled kernels: a format is realised if some kernel computes from the stored
weight itself, and none writes the weight, or the chosen experts' part of it, in a wider type.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from n3c.backends.onnx.linears import Linear
from n3c.ir.diagnostics import Diagnostic
from n3c.ir.formats import FORMATS

from .layers import BITS, Kernel, TensorInfo

_STORED = {"BFloat16": "bf16", "Half": "fp16", "Float": "fp32", "FP8": "fp8", "FP4E2M1": "nvfp4"}
"""TensorRT's name of an element type → format of weights stored so."""
_PACKED = {"Int8": (1, 2), "UInt8": (1, 2), "Int32": (1, 2, 8)}
"""Types in which packed NVFP4 codes are bound or unpacked → how many codes an element may hold."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The verdict on one linear."""

    name: str
    requested: str
    realised: str
    """A format, or `none` where no kernel reads the weight."""
    kernel: str
    expected: str
    """The format that kernels must read: the requested one, or the wider one that the graph dequantizes to."""

    @property
    def ok(self) -> bool:
        """Whether the plan does what the graph asks, or better, without the copy that the graph allows."""
        return self.realised in (self.requested, self.expected)


@dataclass(frozen=True, slots=True)
class Audit:
    """The verdict on one plan."""

    findings: tuple[Finding, ...]
    kernels: int
    scratch_bytes: int

    @property
    def mismatches(self) -> tuple[Finding, ...]:
        """The linears whose precision is not realised."""
        return tuple(f for f in self.findings if not f.ok)

    def diagnostics(self) -> list[Diagnostic]:
        """Return one E0506 a mismatch (exit code 5)."""
        return [
            Diagnostic(
                "E0506", f"`{f.name}` is {f.expected} but the plan computes it as {f.realised} in kernel {f.kernel}"
            )
            for f in self.mismatches
        ]


def audit(
    linears: Sequence[Linear], kernels: Sequence[Kernel], engine_outputs: Collection[str], scratch_bytes: int
) -> Audit:
    """Judge each of `linears` by what `kernels` read and write; `engine_outputs` are never copies of weights."""
    readers: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        for name in {tensor.name for tensor in kernel.inputs}:
            readers.setdefault(name, []).append(kernel)
    outputs = frozenset(engine_outputs)
    return Audit(tuple(_judge(linear, readers, outputs) for linear in linears), len(kernels), scratch_bytes)


def _judge(linear: Linear, readers: Mapping[str, Sequence[Kernel]], engine_outputs: frozenset[str]) -> Finding:
    """Follow the weight through copies of its own width; a wider copy ends the search."""
    realised, where = "none", ""
    pending, seen = [linear.weight], {linear.weight}
    while pending:
        name = pending.pop()
        for kernel in readers.get(name, ()):
            stored = next(tensor for tensor in kernel.inputs if tensor.name == name)
            width = _bits_a_weight(stored, linear) or BITS[stored.dtype]
            copies = [
                (t, bits)
                for t in kernel.outputs
                if t.name not in engine_outputs
                and not _is_transposed_result(t, kernel, linear)
                and (bits := _bits_a_weight(t, linear))
            ]
            wider = next((t for t, bits in copies if bits > width), None)
            if wider is not None:
                return _finding(linear, _STORED.get(wider.dtype, wider.dtype), kernel.name)
            pending.extend(t.name for t, _ in copies if t.name not in seen)
            seen.update(t.name for t, _ in copies)
            if not copies and realised == "none":
                realised, where = _format(stored, linear), kernel.name
    return _finding(linear, realised, where)


def _finding(linear: Linear, realised: str, kernel: str) -> Finding:
    return Finding(linear.name, linear.requested, realised, kernel, linear.expected)


def _bits_a_weight(tensor: TensorInfo, linear: Linear) -> int | None:
    """Return how many bits a weight has in `tensor`, if that holds the weight or the chosen part of it.

    Told by the number of elements, as the builder lays copies out as it likes. Where the linear is applied
    to so many rows that its input [rows, K] or its result [rows, N] may have as many, by the dims of the matrix.
    """
    if linear.rows >= min(linear.shape):
        n, k = linear.shape
        dims = tuple(d for d in tensor.dims if d != 1)
        if dims not in ((n, k), (k, n)) or dims in ((linear.rows, n), (linear.rows, k)):
            return None
    packings = _PACKED.get(tensor.dtype, (1,)) if _has_fp4_codes(linear) else (1,)
    for codes in packings:
        if tensor.elements * codes in (linear.selected, linear.total):
            return BITS[tensor.dtype] // codes
    return None


def _is_transposed_result(tensor: TensorInfo, kernel: Kernel, linear: Linear) -> bool:
    """Whether an output is the result as [N, rows]: at K rows it has the dims of the matrix.

    Its kernel reads the input, of rows times K elements, beside the weight; one that widens a weight does not. Where
    it gathers the input, it reads a larger table of rows of K, as of experts' buckets.
    """
    dims = tuple(d for d in tensor.dims if d != 1)
    k = linear.shape[1]
    reads_input = any(
        t.elements == linear.rows * k or (t.elements > linear.rows * k and t.dims[-1] == k and t.dtype == "Float")
        for t in kernel.inputs
        if t.name != linear.weight
    )
    return reads_input and dims == (linear.shape[0], linear.rows)


def _has_fp4_codes(linear: Linear) -> bool:
    return linear.requested in FORMATS and FORMATS[linear.requested].blocked


def _format(stored: TensorInfo, linear: Linear) -> str:
    if _has_fp4_codes(linear) and (stored.dtype in _PACKED or stored.dtype == "FP4E2M1"):
        return linear.requested
    if linear.requested == "fp8" and stored.dtype in ("Int8", "UInt8"):
        return linear.requested
    return _STORED.get(stored.dtype, stored.dtype)


def audit_json(audits: Mapping[str, Audit]) -> dict[str, Any]:
    """Return `audit.json` for the plans of `audits` (file name → audit)."""
    rows = [
        {
            "name": f.name,
            "requested": f.requested,
            "expected": f.expected,
            "realised": f.realised,
            "kernel": f.kernel,
            "plan": plan,
        }
        for plan, verdict in audits.items()
        for f in verdict.findings
    ]
    return {
        "linears": rows,
        "summary": {
            "requested": _counts(row["requested"] for row in rows),
            "realised": _counts(row["realised"] for row in rows),
            "mismatches": sum(len(verdict.mismatches) for verdict in audits.values()),
        },
        "plans": {
            plan: {"kernels": verdict.kernels, "scratch_bytes": verdict.scratch_bytes}
            for plan, verdict in audits.items()
        },
    }


def _counts(formats: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for format_ in formats:
        counts[format_] = counts.get(format_, 0) + 1
    return dict(sorted(counts.items()))
