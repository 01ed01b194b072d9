"""What each kernel of a plan does: bytes, instructions, operations of tensor cores; by a model of each form.

The builder's listing tells tensors and operators of a kernel, not how it computes. Three kinds of kernels do arithmetic
that may count (`n3c.backends.kernel_work` has what an element costs in each):

sum      a product and a sum in one generated kernel: one output a warp or block. It reads and decodes a weight for
         every row of activations; with rows as the slowest index, from L2 or memory again after the whole matrix.
product  matrix products and attention on tensor cores: each operand once.
other    elements one by one.

What `n3c.backends.kernel_time` makes of it is a prediction: docs/engine-forms.md has its assumptions and what they were
compared with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod

from n3c.backends.kernel_work import (
    FP4_BY_TABLE,
    OTHER,
    SIBLING,
    SINGLE,
    STORED,
    Cost,
    Repeated,
    Work,
    rounded_up,
    sum_cost,
)
from n3c.backends.onnx.bindings import parameter_of
from n3c.backends.onnx.linears import Linear
from n3c.ir.types import DType

from .layers import BITS, DTYPES, Kernel, TensorInfo
from .needs import CacheRead, GatheredWeight, Needs

_SECTOR = 32
"""Bytes that L2 gives at least."""
_PRODUCT_TYPES = {"FP4E2M1": DType.F4E2M1, "FP8": DType.F8E4M3, "BFloat16": DType.BF16, "Half": DType.BF16}


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
    cost = FP4_BY_TABLE if any(_by_table(tensor) for tensor in kernel.inputs if tensor.name in linears) else OTHER
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
        outputs = _siblings(kernel, linear)
        cost = _cost(kernel, tensor, linear, outputs)
        if isinstance(need, GatheredWeight) and need.choice is not None:
            elements = float(linear.selected)
            scales = [t for t in kernel.inputs if parameter_of(t.name) == f"{parameter_of(tensor.name)}_scale"]
            expert = sum(t.bytes // t.dims[0] for t in (tensor, *scales))
            choice = replace(need.choice, by_expert=linear.by_expert)
            repeated.append(Repeated(expert * choice.top_k, choice.tokens, choice))
        else:
            passes = 1 if outputs > 1 else linear.rows
            elements = float(passes * _codes(tensor, linear) * tensor.elements)
            if passes == 1 or _rows_are_slowest(kernel, linear):
                repeated.append(Repeated(tensor.bytes, passes))
            else:
                shared += tensor.bytes * (passes - 1)
        instructions += elements * cost.instructions
        wavefronts += elements * cost.wavefronts
    return Work("sum", stored, handed, tuple(repeated), shared, instructions, wavefronts)


def _siblings(kernel: Kernel, linear: Linear) -> int:
    """Return for how many rows a kernel has an output each, so that it reads the weight once; 1 if all are in one."""
    own = [t for t in kernel.outputs if t.elements == linear.shape[0]]
    return len(own) if linear.rows > 1 and len(own) > 1 else 1


def _cost(kernel: Kernel, tensor: TensorInfo, linear: Linear, outputs: int) -> Cost:
    """Return the cost of a weight and all outputs that it makes, by what the kernel does around it."""
    dtype, fp8 = DTYPES.get(tensor.dtype, DType.I64), linear.requested == "fp8"
    return sum_cost(dtype, kernel.operators, fp8=fp8, by_table=_by_table(tensor), outputs=outputs)


def _by_table(weight: TensorInfo) -> bool:
    """Whether a weight is bound as bytes, which tables decode."""
    return weight.dtype in ("Int8", "UInt8")


def _codes(tensor: TensorInfo, linear: Linear) -> int:
    """Return how many weights an element holds: two where NVFP4 codes are bytes."""
    return 2 if _by_table(tensor) and linear.requested.endswith("nvfp4") else 1


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
    """Return the work of scores (a sum over head_dim for each position) or of values (a sum over positions).

    Several outputs are of heads that share what is read.
    """
    result = max((t.resolved(context) for t in kernel.outputs), key=lambda tensor: tensor.elements)
    further = sum(t.dims == kernel.outputs[0].dims for t in kernel.outputs) - 1
    scores = any(t.dynamic for t in kernel.outputs)
    elements = float(result.elements * (cache.dims[-1] if scores else context))
    cost = STORED.get(DTYPES[cache.dtype], SINGLE) if scores else SINGLE
    width = BITS[cache.dtype] // 8
    # Values: neighbouring lanes read positions, so each takes a sector of its own, for which L2 needs longer than L1.
    sectors = round(elements * (width if scores else _SECTOR))
    instructions = elements * (cost.instructions + further * SIBLING.instructions)
    wavefronts = elements * ((cost.wavefronts if scores else 0.0) + further * SIBLING.wavefronts)
    return Work("sum", stored, handed, (), sectors, instructions, wavefronts)


def _products(kernel: Kernel, context: int) -> dict[DType, float]:
    """Return the operations of a kernel on tensor cores by their type; nothing of one that does without them."""
    if kernel.type == "gemm":
        left, right = kernel.inputs[:2]
        result = max(kernel.outputs, key=lambda tensor: tensor.elements).resolved(context)
        *stack, m, n = result.dims
        flops = 2.0 * prod(stack) * rounded_up(m) * rounded_up(n) * left.resolved(context).dims[-1]
        types = [_PRODUCT_TYPES.get(tensor.dtype) for tensor in (left, right)]
        if None in types:
            return {DType.F32: flops}
        return {DType.BF16 if types[0] is not types[1] else types[0] or DType.BF16: flops}
    if kernel.name.startswith(("_gemm_mha", "_gemv_mha")):
        return {DType.BF16: 4.0 * context * kernel.outputs[0].resolved(context).elements}
    return {}


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
