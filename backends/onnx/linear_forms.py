"""The form of each linear of an entry point: of those that are admissible the one of the least predicted time.

  sum          a product and a sum in one kernel, [rows, N]: it reads and decodes the weight once a row; codes of NVFP4
               are bound as bytes for it, and looked up in tables
  sum_by_rows  the same as [N, rows], and a transpose: neighbouring outputs read the same row of the weight
  siblings     a sum for each row beside each other, in one kernel: it reads and decodes the weight once, for up to 32
  product      a matrix product on tensor cores, behind kernels that prepare its operands

and of linears of chosen experts, where a sum reads those of a token after those of another:

  by_expert    the pairs of a token and an expert in the order of experts: each is read from memory once

`kernels` says what each compiles to, in the terms in which the audit judges plans; `n3c.backends.kernel_time` makes
time of it on the GPUs that a plan is for. What is admissible is no matter of time:

- A draft is judged by the numbers that it is decoded with, so all entry points but prefill compute with the same ones,
  of any number of rows. A product in BF16 rounds what it reads and its result, which no format says; sums, and products
  of what a format rounds, give the same numbers.
- Beside a Loop, as experts that overflow are, engines write a weight that a sum reads to memory in float32 first.

Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Literal

from n3c.backends.gpus import Gpu
from n3c.backends.kernel_time import seconds
from n3c.backends.kernel_work import FP4_BY_TABLE, OTHER, Choice, Repeated, Work, rounded_up, sum_cost
from n3c.ir.formats import NVFP4_BLOCK
from n3c.ir.types import DType

LinearForm = Literal["sum", "sum_by_rows", "siblings", "product", "by_expert"]
MOST_SORTED = 3840
"""Pairs that TopK sorts."""
MOST_SIBLINGS = 32
"""Rows that have an output each of one kernel. With more of them the builder writes the weight to memory in float32."""


LEAST_IN_PLANES = 512
"""Terms of a sum from which on it reads planes: a short one the builder unrolls into what reads it, and with it what it
reads, so that the time to build doubles from layer to layer."""


@dataclass(frozen=True, slots=True)
class Applied:
    """A weight, and the rows that it is applied to in a call."""

    dtype: DType
    """In which its codes are bound: f4e2m1, f8e4m3, bf16, f32, or i8 of codes that tables decode."""
    blocked: bool
    """Whether it has block scales, as NVFP4 has."""
    shape: tuple[int, int]
    """[N, K]."""
    rows: int
    """Sequences times tokens."""
    rounded: bool = False
    """Whether what it is multiplied with is rounded to its format."""
    around: frozenset[str] = frozenset()
    """ONNX operators that a sum computes anew for each output: of a norm, relu² or rounding in front."""
    wide: bool = False
    """Whether products are float32 ones rather than BF16."""
    exact: bool = False
    """Whether nothing may be rounded that the format does not round: in all entry points but prefill."""
    beside_loop: bool = False
    """Whether the entry point has a Loop."""
    choice: Choice | None = None
    """Of chosen experts: who chooses how many."""

    @property
    def by_table(self) -> bool:
        """Whether tables decode its codes, whatever the form."""
        return self.dtype is DType.I8

    @property
    def bytes(self) -> int:
        """Of the weight as it is stored."""
        elements = prod(self.shape)
        bits = (4 if self.blocked else 8) if self.by_table else self.dtype.bits
        return elements * bits // 8 + (elements // NVFP4_BLOCK if self.blocked else 0)


Choose = Callable[[Applied], LinearForm]
"""Chooses the form of a linear."""


def admissible(applied: Applied) -> tuple[LinearForm, ...]:
    """Return the forms that a linear may take, at least one, whatever their time."""
    if applied.choice is not None:
        pairs = applied.choice.tokens * applied.choice.top_k
        return ("sum", "by_expert") if applied.choice.tokens > 1 and pairs <= MOST_SORTED else ("sum",)
    found: list[LinearForm] = []
    if not applied.beside_loop:
        found.append("sum")
        if applied.rows > 1 and not (applied.by_table and applied.blocked):  # planes of x are of one row
            found.append("sum_by_rows")
        if 1 < applied.rows <= MOST_SIBLINGS and not applied.blocked:
            found.append("siblings")
    if applied.beside_loop or not (applied.exact and rounds("product", applied)):
        found.append("product")
    return tuple(found)


def rounds(form: LinearForm, applied: Applied) -> bool:
    """Return whether a form computes with other numbers than a sum does: BF16 of what it is multiplied with."""
    native = applied.rounded and not applied.by_table
    return form == "product" and not (applied.wide or native or applied.dtype is DType.F32)


def is_read_as_bytes(dtype: DType, k: int) -> bool:
    """Return whether a sum of `k` terms reads the codes of a weight as bytes that are bound in `dtype`."""
    return dtype is DType.F4E2M1 and k >= LEAST_IN_PLANES


def kernels(form: LinearForm, applied: Applied) -> tuple[Work, ...]:
    """Return what the kernels of a form do, those in front that prepare its operands included."""
    (n, k), rows = applied.shape, applied.rows
    x, y = 4 * rows * k, 4 * rows * n
    if applied.choice is not None:
        return tuple(_chosen(form, applied, applied.choice))
    if form == "product":
        return tuple(_product(applied, x, y))
    if form == "siblings":
        return tuple(_siblings(applied))
    by_table = applied.by_table or (form == "sum" and is_read_as_bytes(applied.dtype, k))
    rounding = 3 if applied.rounded and applied.blocked else 0  # division, codes, values
    preparing = 1 if by_table and applied.blocked else rounding  # planes, rounded in the same kernel
    cost = sum_cost(applied.dtype, applied.around, fp8=not applied.blocked, by_table=by_table)
    elements = float(rows * n * k)
    instructions, wavefronts = elements * cost.instructions, elements * cost.wavefronts
    before = (_elementwise(x),) * preparing
    if form == "sum":
        again = (Repeated(applied.bytes, rows),)
        return (*before, Work("sum", applied.bytes, (x, y), again, 0, instructions, wavefronts))
    shared = applied.bytes * (rows - 1)
    return (*before, Work("sum", applied.bytes, (x, y), (), shared, instructions, wavefronts), _elementwise(y))


def _siblings(applied: Applied) -> Iterator[Work]:
    n, k = applied.shape
    around = applied.around - {"RMSNormalization"}  # behind the sum, by the kernel that finds the mean of squares
    rows, by_table = applied.rows, applied.by_table
    cost = sum_cost(applied.dtype, around, fp8=not applied.blocked, by_table=by_table, outputs=rows)
    instructions, wavefronts = n * k * cost.instructions, n * k * cost.wavefronts
    yield Work("sum", applied.bytes, (4 * rows * k, 4 * rows * n), (), 0, instructions, wavefronts)
    yield _elementwise(4 * rows * n)  # they are joined, if not in the next kernel


def _chosen(form: LinearForm, applied: Applied, choice: Choice) -> Iterator[Work]:
    n, k = applied.shape
    pairs = choice.tokens * choice.top_k
    if form == "by_expert":
        choice = replace(choice, by_expert=True)
        yield _elementwise(4 * pairs)  # the order, for both linears, and its inverse
        yield _elementwise(4 * pairs * k)
        yield _elementwise(4 * pairs * n)
    cost = sum_cost(applied.dtype, applied.around, fp8=not applied.blocked, by_table=applied.by_table)
    elements, again = float(pairs * n * k), (Repeated(applied.bytes * choice.top_k, choice.tokens, choice),)
    stored = round(applied.bytes * choice.distinct)
    handed = (4 * pairs * k, 4 * pairs * n)
    yield Work("sum", stored, handed, again, 0, elements * cost.instructions, elements * cost.wavefronts)


def _product(applied: Applied, x: int, y: int) -> Iterator[Work]:
    (n, k), rows = applied.shape, applied.rows
    stored, operand, dtype = applied.bytes, x // 2, DType.F32 if applied.wide else DType.BF16
    handed: tuple[int, ...] = ()
    if applied.rounded and not applied.by_table:
        dtype, operand = applied.dtype, x * applied.dtype.bits // 32
        yield _elementwise(x)
        if applied.blocked:  # codes, and scales in the order of tiles: twice for x, once for the weight
            scales = n * k // NVFP4_BLOCK
            yield from (_elementwise(x), _elementwise(x // 4), _elementwise(x // 4))
            yield Work("other", scales, (scales,), (), 0, scales * OTHER.instructions, scales * OTHER.wavefronts)
    elif applied.dtype not in (DType.F32, dtype):
        width = 4 if applied.wide else 2
        cost = FP4_BY_TABLE if applied.by_table else OTHER
        handed, stored = (width * n * k,), 0
        yield Work("other", applied.bytes, handed, (), 0, n * k * cost.instructions, n * k * cost.wavefronts)
        yield _elementwise(x)
    elif applied.dtype is DType.BF16:
        yield _elementwise(x)
    flops = {dtype: 2.0 * rounded_up(rows) * rounded_up(n) * k}
    yield Work("product", stored, (*handed, operand, y), flops=flops)


def _elementwise(size: int) -> Work:
    """Return the work of a kernel that goes through a float32 activation of `size` bytes."""
    steps = size / 4
    return Work("other", 0, (size, size), (), 0, steps * OTHER.instructions, steps * OTHER.wavefronts)


def seconds_of(form: LinearForm, applied: Applied, gpu: Gpu) -> float:
    """Return the predicted time of a form on a GPU."""
    return seconds(kernels(form, applied), gpu)


@cache
def fastest(*gpus: Gpu) -> Choose:
    """Return the choice of the least predicted time on `gpus`: of several, by the geometric mean."""

    @cache
    def choose(applied: Applied) -> LinearForm:
        return min(admissible(applied), key=lambda form: prod(seconds_of(form, applied, gpu) for gpu in gpus))

    return choose
