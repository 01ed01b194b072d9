"""Source expressions: how a parameter is made from tensors of the released checkpoint.

They are values without behaviour, so no pass ever touches a weight; `n3c.backends.safetensors`
evaluates them, streamed. `str` gives the text of bindings.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .formats import INPUT_SCALE


@dataclass(frozen=True)
class Tensor:
    """One tensor of the checkpoint."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Stack:
    """`count` tensors along a new first dim; `*` in `pattern` stands for 0, 1, … (one a routed expert)."""

    pattern: str
    count: int

    def __str__(self) -> str:
        return f"stack({self.pattern}, {self.count})"


@dataclass(frozen=True)
class Concat:
    """Parts joined along dim 0: rows of linears that read the same input."""

    parts: tuple[Source, ...]

    def __str__(self) -> str:
        return f"concat({', '.join(map(str, self.parts))})"


@dataclass(frozen=True)
class NegExp:
    """-exp(x): the decay rate A of Mamba-2 from A_log."""

    operand: Source

    def __str__(self) -> str:
        return f"neg_exp({self.operand})"


@dataclass(frozen=True)
class Nvfp4:
    """One part of the NVFP4 form of a weight: `codes`, `scale` (a block) or `scale_2` (a matrix).

    Read from the checkpoint where it is quantized there, else computed with blocks of `block_rows` x 16.
    """

    operand: Source
    part: str
    block_rows: int
    scaled_with: tuple[str, ...] = ()
    """Tensors that have one scale of a matrix, by their largest magnitude, the operand among them; empty: its own."""

    def __str__(self) -> str:
        return f"nvfp4_{self.part}({self.operand}, {self.block_rows}x16)"


@dataclass(frozen=True)
class Fp8:
    """One part of the per-tensor FP8 form of a weight: `codes` or `scale`."""

    operand: Source
    part: str
    scaled_with: tuple[str, ...] = ()
    """As of NVFP4."""

    def __str__(self) -> str:
        return f"fp8_{self.part}({self.operand})"


@dataclass(frozen=True)
class Bytes:
    """The bytes of packed codes as i8, two codes each: a view, not a copy."""

    operand: Source

    def __str__(self) -> str:
        return f"bytes({self.operand})"


@dataclass(frozen=True)
class Dequantized:
    """A weight dequantized to float32: the exact product of codes and scales."""

    codes: Nvfp4 | Fp8

    def __str__(self) -> str:
        return f"dequantized({self.codes})"


@dataclass(frozen=True)
class Rounded:
    """A weight that is deployed in BF16, in float32: rounded, where the checkpoint holds more digits."""

    operand: Source

    def __str__(self) -> str:
        return f"rounded({self.operand})"


@dataclass(frozen=True)
class CacheScale:
    """Scale of an FP8 cache: what the checkpoint holds (amax / 448) times 448/352, so that 352 is amax; else 1."""

    name: str

    def __str__(self) -> str:
        return f"cache_scale({self.name})"


@dataclass(frozen=True)
class InputScale:
    """Scale of what a linear reads, `….input_scale`: of stacked experts the largest; 1 where there is none."""

    weight: Tensor | Stack

    def __str__(self) -> str:
        return f"input_scale({self.weight})"

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that hold it, one a matrix."""
        return tuple(name.removesuffix(".weight") + INPUT_SCALE for name in tensor_names(self.weight))


Source = Tensor | Stack | Concat | NegExp | Nvfp4 | Fp8 | Bytes | Dequantized | Rounded | CacheScale | InputScale


def leaves(source: Source) -> Iterator[Tensor | Stack]:
    """Yield what `source` reads of the checkpoint, in order; scales of caches and inputs are optional and left out."""
    match source:
        case Tensor() | Stack():
            yield source
        case Concat(parts):
            for part in parts:
                yield from leaves(part)
        case NegExp(operand) | Nvfp4(operand) | Fp8(operand) | Bytes(operand) | Rounded(operand):
            yield from leaves(operand)
        case Dequantized(codes):
            yield from leaves(codes)
        case CacheScale() | InputScale():
            return


def tensor_names(source: Source) -> Iterator[str]:
    """Yield the checkpoint tensors that `source` needs, in order."""
    for leaf in leaves(source):
        match leaf:
            case Tensor(name):
                yield name
            case Stack(pattern, count):
                yield from (pattern.replace("*", str(i)) for i in range(count))
