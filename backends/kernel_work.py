"""What a kernel does on any GPU, and what an element costs in each form: one table for the audit and for the choice.

What a kernel does with an element was counted once for each form: instructions of the inner loop, and wavefronts
(accesses of the L1 cache, more than one where lanes read places far apart), both a lane's. `n3c.backends.trt.work`
reads from a listing what kernels do; `n3c.backends.onnx.linear_forms` says what those of a form would do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from n3c.ir.costs import distinct_experts
from n3c.ir.types import DType

TILE = 16
"""Rows and columns to which tensor cores round matrices up."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one element and row, in a lane."""

    instructions: float
    wavefronts: float


# Counted by compiling for SM 120 and disassembling, good to about a fifth. Eight elements a load, unless said.
STORED = {
    DType.F32: Cost(3.0, 2.0),
    DType.BF16: Cost(4.0, 1.5),
    DType.F16: Cost(4.0, 1.5),
    DType.F8E4M3: Cost(5.5, 1.3),
    DType.F4E2M1: Cost(36.0, 3.0),  # one element a load: block scales are expanded along the sum
}
"""Type of a weight → reading, decoding and adding one."""
SINGLE = Cost(14.0, 2.0)
"""Wider types with one element a load: after a gather, or a number that is only known when it runs."""
FP4_BY_TABLE = Cost(12.5, 3.2)
"""A block of 16 a step through tables of 16 entries, with x as planes: neighbouring lanes read it side by side."""
FP8_BY_TABLE = Cost(8.0, 9.0)
"""Not counted: estimated from NVFP4's."""
OTHER = Cost(8.0, 1.0)
"""Of kernels that go through elements one by one."""
SIBLING = Cost(1.7, 1.0)
"""Of each further output of a kernel that reads and decodes an element for several: an operand, a product and a sum."""
_NORM, _NORM_SINGLE = 3.4, 5.0
"""Instructions of an RMSNorm in front of the sum, computed anew for each output: eight elements a load, or one."""
_GROUPED_NORM, _GROUPED_NORM_SINGLE = 5.0, 41.0
"""Of the gated norm, whose groups cost divisions."""
_RELU2 = 2.5
_ROUND = 3.5
"""Of rounding to FP8 and back in front of the sum, computed anew for each output. Not counted: estimated."""


def sum_cost(dtype: DType, around: Collection[str], *, fp8: bool, by_table: bool, outputs: int = 1) -> Cost:
    """Return the cost of a weight in a kernel of products and sums with an output for each of `outputs` rows.

    `dtype` is the type in which the weight is bound and `around` the ONNX operators of the kernel: norm, relu² and
    rounding of what is multiplied with, gathers. By tables a weight is FP8 or NVFP4.
    """
    single = dtype is DType.F4E2M1 or "Gather" in around or "Relu" in around
    if by_table:
        cost = FP8_BY_TABLE if fp8 else FP4_BY_TABLE
    else:
        cost = SINGLE if single and dtype is not DType.F4E2M1 else STORED.get(dtype, SINGLE)
    instructions = 0.0
    if "RMSNormalization" in around:
        instructions += _NORM_SINGLE if single else _NORM
    if "Sqrt" in around:
        instructions += _GROUPED_NORM_SINGLE if single else _GROUPED_NORM
    if "Relu" in around:
        instructions += _RELU2
    if "QuantizeLinear" in around:
        instructions += _ROUND
    further = outputs - 1
    return Cost(
        cost.instructions + further * SIBLING.instructions + outputs * instructions,
        cost.wavefronts + further * SIBLING.wavefronts,
    )


def rounded_up(size: int) -> int:
    """Return to what tensor cores round up a number of rows or columns."""
    return -(-size // TILE) * TILE


@dataclass(frozen=True, slots=True)
class Choice:
    """Tokens that choose experts, each for itself: how often an expert is read."""

    experts: int
    top_k: int
    tokens: int
    by_expert: bool = False
    """Whether those who chose the same come one after the other."""

    @property
    def distinct(self) -> float:
        """Experts that are read at least once, by expectation."""
        return distinct_experts(self.experts, self.top_k, self.tokens)

    def fetched(self, kept: int) -> float:
        """Return how many experts are read from memory, by expectation, where a cache holds those of `kept` tokens.

        Tokens come one after the other: an expert that one of the last `kept` chose, too, is still there.
        """
        if self.by_expert:
            return self.distinct
        missed = 1 - self.top_k / self.experts
        return self.top_k * sum(missed ** min(token, kept) for token in range(self.tokens))


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
        kept = cache // self.bytes
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
