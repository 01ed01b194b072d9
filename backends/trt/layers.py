"""The kernels of a plan, read from the builder's own listing.

A plan cannot be inspected without a driver, but with detailed profiling verbosity and a verbose
logger the builder lists every compiled layer with all its tensors; this module reads that text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

from n3c.backends.onnx.graph import LOOP
from n3c.ir.types import DType

DTYPES = {
    "Float": DType.F32,
    "Half": DType.F16,
    "BFloat16": DType.BF16,
    "FP8": DType.F8E4M3,
    "FP4E2M1": DType.F4E2M1,
    "Int64": DType.I64,
    "Int8": DType.I8,
}
"""TensorRT's name of an element type → the type of programs."""
BITS = {name: dtype.bits for name, dtype in DTYPES.items()} | {"Int32": 32, "UInt8": 8, "Bool": 8}
"""TensorRT's name of an element type → bits of one element. The last three hold what programs have no values of."""

SYNCHRONISATION = ("signal", "wait", "shape_call")
"""Layer types that order streams or compute shapes on the host: no kernels."""

_TENSOR = re.compile(
    r"\{ Name: (?P<name>.*?), Dimensions: \[(?P<dims>[\d,-]*)\](?:, Strides: \[(?P<strides>[\d,-]*)\])?"
    r".*?Datatype: (?P<dtype>\w+)"
)
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")

_REDUCING = (
    "Attention", "CumSum", "Gemm", "MatMul", "ReduceMax", "ReduceMean", "ReduceSum",
    "RMSNormalization", "Softmax", "TopK"
)  # fmt: skip
"""ONNX operators whose results depend on more than one element of an operand."""

DYNAMIC = -1
"""A dim that the engine learns when it runs."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as a kernel sees it; `dtype` is TensorRT's name."""

    name: str
    dims: tuple[int, ...]
    """Sizes, `DYNAMIC` where one is not known."""
    strides: tuple[int, ...]
    dtype: str

    @property
    def dynamic(self) -> bool:
        """Whether a dim is not known."""
        return DYNAMIC in self.dims

    @property
    def elements(self) -> int:
        """Number of elements; meaningless where a dim is not known."""
        return prod(self.dims)

    @property
    def bytes(self) -> int:
        """Size in bytes, packed; meaningless where a dim is not known."""
        return (self.elements * BITS[self.dtype] + 7) // 8

    def resolved(self, length: int) -> TensorInfo:
        """Return the tensor with `length` for the dims that are not known."""
        return replace(self, dims=tuple(length if d == DYNAMIC else d for d in self.dims)) if self.dynamic else self


@dataclass(frozen=True, slots=True)
class Kernel:
    """One compiled layer: one kernel launch, unless its type is one of `SYNCHRONISATION`."""

    name: str
    type: str
    """`kgen` (generated), `gemm`, `runtime_fusion`, …"""
    tactic: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    constants: tuple[TensorInfo, ...] = ()
    """Constants of the plan: tables, masks, positions."""
    nodes: tuple[str, ...] = ()
    """Names of the ONNX nodes that it computes, where the builder says so."""

    @property
    def in_place(self) -> frozenset[str]:
        """The tensors that it both reads and writes."""
        return frozenset({tensor.name for tensor in self.inputs} & {tensor.name for tensor in self.outputs})

    @property
    def dynamic(self) -> bool:
        """Whether a dim of what it reads or writes is not known."""
        return any(tensor.dynamic for tensor in (*self.inputs, *self.outputs))

    @property
    def in_loop(self) -> bool:
        """Whether all that it computes are nodes of a Loop's body."""
        return bool(self.nodes) and all(f"/{LOOP}" in node for node in self.nodes)

    @property
    def labels(self) -> tuple[str, ...]:
        """The calls that it computes, by their labels (`backbone.layers.3`), each once."""
        return tuple(dict.fromkeys(node.partition("/")[0] for node in self.nodes if "/" in node))

    @property
    def operators(self) -> frozenset[str]:
        """The ONNX operators that it computes, or begins or ends."""
        return frozenset(node.rpartition("/")[2].partition(".")[0] for node in self.nodes)

    @property
    def sums(self) -> bool:
        """Whether it is generated and sums products itself, rather than to prepare a matrix product."""
        return self.type == "kgen" and "ReduceSum" in self.operators and not self.operators & {"Gemm", "MatMul"}

    @property
    def reduces(self) -> bool:
        """Whether it may read more than it writes: it sums, or its kind is unknown."""
        return not self.nodes or not self.operators.isdisjoint(_REDUCING)


def parse_layers(listing: str) -> tuple[Kernel, ...]:
    """Return the kernels of the builder's listing, in order; ValueError where it is not understood."""
    return tuple(kernel for kernel in _layers(listing) if kernel.type not in SYNCHRONISATION)


def _layers(listing: str) -> Iterator[Kernel]:
    for line in listing.splitlines():
        if not line.startswith("Name: ") or ", LayerType: " not in line:
            continue
        name, _, rest = line.removeprefix("Name: ").partition(", LayerType: ")
        tactic = re.search(r", TacticName: ([^,]*)", rest)
        yield Kernel(
            name,
            rest.partition(",")[0],
            tactic[1] if tactic else "",
            tuple(_tensors(_list(rest, "Inputs"))),
            tuple(_tensors(_list(rest, "Outputs"))),
            tuple(_tensors(_list(rest, "Constants"))) if "Constants: [" in rest else (),
            tuple(_NODE.findall(rest)),
        )


def _list(line: str, key: str) -> str:
    """Return what is between the brackets after `key`; lists nest."""
    start = line.find(f"{key}: [")
    depth = 0
    for i in range(start, len(line) if start >= 0 else start):
        depth += {"[": 1, "]": -1}.get(line[i], 0)
        if depth == 0 and line[i] == "]":
            return line[start : i + 1]
    raise ValueError(f"no list of {key} in the layer listing: {line[:200]}")


def _tensors(text: str) -> Iterator[TensorInfo]:
    for match in _TENSOR.finditer(text):
        if match["dtype"] not in BITS:
            raise ValueError(f"unknown element type {match['dtype']} of {match['name']}")
        yield TensorInfo(match["name"], _integers(match["dims"]), _integers(match["strides"] or ""), match["dtype"])


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)
