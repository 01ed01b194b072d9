"""The kernels of a plan, read from the builder's own listing.

A plan cannot be inspected without a driver, but with detailed profiling verbosity and a verbose
logger the builder lists every compiled layer with all its tensors; this module reads that text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

LISTING = "Layers:"
"""How the builder's message with the listing begins."""

BITS = {
    "Float": 32,
    "Half": 16,
    "BFloat16": 16,
    "FP8": 8,
    "FP4E2M1": 4,
    "Int64": 64,
    "Int32": 32,
    "Int8": 8,
    "UInt8": 8,
    "Bool": 8,
}
"""TensorRT's name of an element type → bits of one element."""

SYNCHRONISATION = ("signal", "wait")
"""Layer types that only order streams."""

_TENSOR = re.compile(
    r"\{ Name: (?P<name>.*?), Dimensions: \[(?P<dims>[\d,]*)\](?:, Strides: \[(?P<strides>[\d,-]*)\])?"
    r".*?Datatype: (?P<dtype>\w+)"
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as a kernel sees it; `dtype` is TensorRT's name."""

    name: str
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.dims)

    @property
    def bytes(self) -> int:
        """Size in bytes, packed."""
        return (self.elements * BITS[self.dtype] + 7) // 8


@dataclass(frozen=True, slots=True)
class Kernel:
    """One compiled layer: one kernel launch, unless its type is one of `SYNCHRONISATION`."""

    name: str
    type: str
    """`kgen` (generated), `gemm`, `runtime_fusion`, …"""
    tactic: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


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


def traffic(kernels: tuple[Kernel, ...], touched: Mapping[str, int] | None = None) -> dict[str, int]:
    """Return the bytes that kernels read and write, by kernel type.

    `touched` gives, for engine tensors of which only a part is moved (gathered experts, caches written
    in place), the bytes that count instead of the whole.
    """
    moved: dict[str, int] = {}
    for kernel in kernels:
        tensors = (*kernel.inputs, *kernel.outputs)
        size = sum(touched[t.name] if touched and t.name in touched else t.bytes for t in tensors)
        moved[kernel.type] = moved.get(kernel.type, 0) + size
    return moved
