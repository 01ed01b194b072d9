"""What a kernel does on any GPU: bytes, instructions, operations of tensor cores; by a model of each form.

The builder's listing tells tensors and operators of a kernel, not how it computes. What it does with an element was
counted once for each form: instructions of the inner loop, and wavefronts (accesses of the L1 cache, more than one
where lanes read places far apart), both a lane's. Three kinds of kernels do arithmetic that may count:

sum      a product and a sum in one generated kernel: one output a warp or block. It reads and decodes a weight for
         every row of activations; with rows as the slowest index, from L2 or memory again after the whole matrix.
product  matrix products and attention on tensor cores: each operand once.
other    elements one by one.

What `n3c.backends.trt.timing` makes of it is a prediction: docs/engine-forms.md has its assumptions and what they were
compared with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod

from n3c.backends.onnx.linears import Linear
from n3c.ir.types import DType

from .layers import BITS, Kernel, TensorInfo
from .needs import CacheRead, Choice, GatheredWeight, Needs

_TILE = 16
"""Rows and columns to which tensor cores round matrices up."""
_TABLE = 256
"""Entries of a table that decodes a byte."""
_SECTOR = 32
"""Bytes that L2 gives at least."""
_PRODUCT_TYPES = {"FP4E2M1": DType.F4E2M1, "FP8": DType.F8E4M3, "BFloat16": DType.BF16, "Half": DType.BF16}


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one element and row, in a lane."""

    instructions: float
    wavefronts: float


# Counted by compiling for SM 120 and disassembling, good to about a fifth. Eight elements a load, unless said.
_STORED = {
    "Float": Cost(3.0, 2.0),
    "BFloat16": Cost(4.0, 1.5),
    "Half": Cost(4.0, 1.5),
    "FP8": Cost(5.5, 1.3),
    "FP4E2M1": Cost(36.0, 3.0),  # one element a load: block scales are expanded along the sum
}
"""Type of a weight → reading, decoding and adding one."""
_SINGLE = Cost(14.0, 2.0)
"""Wider types with one element a load: after a gather, or a number that is only known when it runs."""
_FP4_BY_TABLE = Cost(15.5, 4.3)
"""A block of 16 a step through tables, with x as planes: neighbouring lanes read it side by side."""
_FP8_BY_TABLE = Cost(8.0, 9.0)
"""Not counted: estimated from NVFP4's."""
_NORM, _NORM_SINGLE = 3.4, 5.0
"""Instructions of an RMSNorm in front of the sum, computed anew for each output: eight elements a load, or one."""
_GROUPED_NORM, _GROUPED_NORM_SINGLE = 5.0, 41.0
"""Of the gated norm, whose groups cost divisions."""
_RELU2 = 2.5
_ROUND = 3.5
"""Of rounding to FP8 and back in front of the sum, computed anew for each output. Not counted: estimated."""
_OTHER = Cost(8.0, 1.0)


@dataclass(frozen=True, slots=True)
class Repeated:
    """A weight that a kernel reads once for each row."""

    bytes: int
    """Of one row's pass: the whole matrix, or all chosen experts of a token."""
    passes: int
    choice: Choice | None = None
    """Of experts: who reads which."""

    @property
    def further(self) -> float:
        """Bytes that are read beyond once."""
        if self.choice is None:
            return float((self.passes - 1) * self.bytes)
        return self.bytes * (self.passes - self.choice.distinct / self.choice.top_k)

    def missed(self, cache: int) -> float:
        """Return the part of `further` that a cache of so many bytes does not have any more."""
        if self.choice is None:
            return float((self.passes - 1) * max(0, self.bytes - cache))
        kept = cache // max(self.bytes, 1)
        return self.bytes / self.choice.top_k * (self.choice.fetched(kept) - self.choice.distinct)


@dataclass(frozen=True, slots=True)
class Work:
    """What one kernel does."""

    form: str
    """`sum`, `product` or `other`."""
    stored: int
    """Bytes of weights, states, inputs and outputs, each once."""
    passing: tuple[int, ...]
    """Sizes of what one kernel leaves to another, and of constants."""
    repeated: tuple[Repeated, ...] = ()
    sectors: int = 0
    """Bytes that L2 gives beyond those from memory: of whole sectors, and to neighbours that read the same."""
    instructions: float = 0.0
    wavefronts: float = 0.0
    flops: Mapping[DType, float] = field(default_factory=dict[DType, float])


IDLE = Work("idle", 0, ())
"""Of a kernel within a Loop: with a router that loads experts evenly no bucket overflows, so no round is run."""


def work_of(
    kernel: Kernel, needs: Needs, linears: Mapping[str, Linear], context: int, *, moved: int, passing: Iterable[int]
) -> Work:
    """Return the work of `kernel`.

    `linears` are those of the entry point by the weight that they read; `moved` are all bytes that it moves, each
    tensor once, of which `passing` come from or go to other kernels.
    """
    handed = tuple(passing)
    stored = moved - sum(handed)
    flops = _products(kernel, context)
    if flops:
        return Work("product", stored, handed, flops=flops)
    weights = [(tensor, linears[tensor.name]) for tensor in kernel.inputs if tensor.name in linears]
    if weights and kernel.sums:
        return _sum(kernel, needs, weights, stored, handed)
    caches = [
        t for t in kernel.inputs if isinstance(needs.reads.get(t.name), CacheRead) and t.name not in kernel.in_place
    ]
    if caches and kernel.sums:
        return _attention(kernel, caches[0], context, stored, handed)
    cost = _FP4_BY_TABLE if _by_table(kernel) else _OTHER
    steps = _elements(kernel, needs, context)
    return Work("other", stored, handed, (), 0, steps * cost.instructions, steps * cost.wavefronts)


def _sum(
    kernel: Kernel, needs: Needs, weights: list[tuple[TensorInfo, Linear]], stored: int, handed: tuple[int, ...]
) -> Work:
    repeated: list[Repeated] = []
    shared = 0
    instructions = wavefronts = 0.0
    for tensor, linear in weights:
        need = needs.reads.get(tensor.name)
        cost = _cost(kernel, tensor, linear)
        if isinstance(need, GatheredWeight) and need.choice is not None:
            elements = float(linear.selected)
            scales = [t for t in kernel.inputs if t.name == f"{tensor.name}_scale"]
            expert = sum(t.bytes // t.dims[0] for t in (tensor, *scales))
            repeated.append(Repeated(expert * need.choice.top_k, need.choice.tokens, need.choice))
        else:
            elements = float(linear.rows * _codes(tensor, linear) * tensor.elements)
            if _rows_are_slowest(kernel, linear):
                repeated.append(Repeated(tensor.bytes, linear.rows))
            else:
                shared += tensor.bytes * (linear.rows - 1)
        instructions += elements * cost.instructions
        wavefronts += elements * cost.wavefronts
    return Work("sum", stored, handed, tuple(repeated), shared, instructions, wavefronts)


def _cost(kernel: Kernel, tensor: TensorInfo, linear: Linear) -> Cost:
    """Return the cost of a weight and row, by what the kernel does around it."""
    operators = kernel.operators
    single = tensor.dtype == "FP4E2M1" or "Gather" in operators or "Relu" in operators
    if _by_table(kernel):
        cost = _FP8_BY_TABLE if linear.requested == "fp8" else _FP4_BY_TABLE
    else:
        cost = _SINGLE if single and tensor.dtype != "FP4E2M1" else _STORED.get(tensor.dtype, _SINGLE)
    around = 0.0
    if "RMSNormalization" in operators:
        around += _NORM_SINGLE if single else _NORM
    if "Sqrt" in operators:
        around += _GROUPED_NORM_SINGLE if single else _GROUPED_NORM
    if "Relu" in operators:
        around += _RELU2
    if "QuantizeLinear" in operators:
        around += _ROUND
    return Cost(cost.instructions + around, cost.wavefronts)


def _by_table(kernel: Kernel) -> bool:
    return any(constant.elements == _TABLE for constant in kernel.constants)


def _codes(tensor: TensorInfo, linear: Linear) -> int:
    """Return how many weights an element holds: two where NVFP4 codes are bytes."""
    return 2 if tensor.dtype in ("Int8", "UInt8") and linear.requested.endswith("nvfp4") else 1


def _rows_are_slowest(kernel: Kernel, linear: Linear) -> bool:
    """Whether neighbouring outputs are of one row: then the whole weight passes before it is read again."""
    if linear.rows == 1:
        return True
    for output in kernel.outputs:
        dims = [dim for dim in output.dims if dim != 1]
        if dims and dims[-1] == linear.rows and prod(dims) % linear.rows == 0 and linear.rows not in linear.shape:
            return False
    return True


def _attention(kernel: Kernel, cache: TensorInfo, context: int, stored: int, handed: tuple[int, ...]) -> Work:
    """Return the work of scores (a sum over head_dim for each position) or of values (a sum over positions)."""
    result = max((t.resolved(context) for t in kernel.outputs), key=lambda tensor: tensor.elements)
    scores = any(t.dynamic for t in kernel.outputs)
    elements = float(result.elements * (cache.dims[-1] if scores else context))
    cost = _STORED.get(cache.dtype, _SINGLE) if scores else _SINGLE
    width = BITS[cache.dtype] // 8
    # Values: neighbouring lanes read positions, so each takes a sector and a wavefront of its own.
    sectors = round(elements * (width if scores else _SECTOR))
    wavefronts = elements * (cost.wavefronts if scores else 32.0)
    return Work("sum", stored, handed, (), sectors, elements * cost.instructions, wavefronts)


def _products(kernel: Kernel, context: int) -> dict[DType, float]:
    """Return the operations of a kernel on tensor cores by their type; nothing of one that does without them."""
    if kernel.type == "gemm":
        left, right = kernel.inputs[:2]
        result = max(kernel.outputs, key=lambda tensor: tensor.elements).resolved(context)
        *stack, m, n = result.dims
        flops = 2.0 * prod(stack) * _rounded(m) * _rounded(n) * left.resolved(context).dims[-1]
        types = [_PRODUCT_TYPES.get(tensor.dtype) for tensor in (left, right)]
        if None in types:
            return {DType.F32: flops}
        return {DType.BF16 if types[0] is not types[1] else types[0] or DType.BF16: flops}
    if kernel.name.startswith(("_gemm_mha", "_gemv_mha")):
        return {DType.BF16: 4.0 * context * kernel.outputs[0].resolved(context).elements}
    return {}


def _rounded(size: int) -> int:
    return -(-size // _TILE) * _TILE


def _elements(kernel: Kernel, needs: Needs, context: int) -> float:
    """Return the elements that a kernel goes through: of the largest tensor, as far as it reads or writes it."""
    found = 0.0
    for tensors, known in ((kernel.inputs, needs.reads), (kernel.outputs, needs.writes)):
        for tensor in tensors:
            need = known.get(tensor.name)
            if need is None:
                found = max(found, float(tensor.resolved(context).elements))
            else:
                found = max(found, need.moved(kernel, tensor, context) * 8 / BITS[tensor.dtype])
    return found
