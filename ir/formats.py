"""The formats of a weight: which tensors store it, of which types and shapes, under which names.

    nvfp4, w4a16_nvfp4   X.weight f4e2m1 [out, in]   X.weight_scale f8e4m3 [out, in/16]   X.weight_scale_2 f32 []
    fp8                  X.weight f8e4m3 [out, in]   X.weight_scale f32 []
    bf16                 X.weight bf16 [out, in]

A stack of matrices has its dims in front of all of them. The suffixes are those of ModelOpt's checkpoints. Where
the activations that a linear reads are quantized too, the checkpoint holds their scale, `X.input_scale`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from .types import DType, TensorType

NVFP4_BLOCK = 16
"""Elements along the input axis that share one E4M3 scale."""
E2M1_MAX = 6.0
E4M3_MAX = 448.0

INPUT_SCALE = ".input_scale"
"""After the name of a linear: the scale of what it reads, float32."""
CACHE_SCALES = (".k_scale", ".v_scale")
"""After the names of k_proj and v_proj: the scales of an FP8 cache, float32."""


class Covers(Enum):
    """How many weights one element of a stored tensor belongs to."""

    WEIGHT = "one weight"
    BLOCK = "NVFP4_BLOCK weights along K"
    MATRIX = "a matrix"


@dataclass(frozen=True, slots=True)
class Part:
    """One of the tensors that store a weight."""

    name: str
    """`codes`, `scale` or `scale_2`."""
    suffix: str
    """After the name of the weight."""
    dtype: DType
    covers: Covers

    def type(self, weight: TensorType) -> TensorType:
        """Return its type for a weight [..., out, in]."""
        dims = weight.dims
        if self.covers is Covers.BLOCK:
            dims = (*dims[:-1], weight.static_dims[-1] // NVFP4_BLOCK)
        elif self.covers is Covers.MATRIX:
            dims = dims[:-2]
        return TensorType(self.dtype, dims)


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """One format of [quantization]."""

    name: str
    parts: tuple[Part, ...]
    """The codes first."""
    input_divisor: float | None = None
    """Largest magnitude of an input / its scale; None: activations are not quantized."""
    weight_only: str = ""
    """The format that it is where activations have no scale; empty: itself."""
    modelopt: str | None = None
    """ModelOpt's name of it (`quant_algo`); None: not quantized."""
    uncalibrated_scale: float | None = None
    """The `input_scale` that is stored where none was measured, as no reader has a weight-only form; None: none is."""

    @property
    def codes(self) -> Part:
        """The tensor that holds an element for each weight, under the weight's own name."""
        return self.parts[0]

    @property
    def scales(self) -> tuple[Part, ...]:
        """The tensors that are stored besides the codes."""
        return self.parts[1:]

    @property
    def quantized(self) -> bool:
        """Whether it has scales."""
        return bool(self.scales)

    @property
    def blocked(self) -> bool:
        """Whether blocks of weights have scales: K is then a multiple of NVFP4_BLOCK."""
        return any(part.covers is Covers.BLOCK for part in self.parts)

    @property
    def bits(self) -> float:
        """Bits a weight, with the scales of blocks; those of matrices are not counted."""
        shares = {Covers.WEIGHT: 1.0, Covers.BLOCK: 1 / NVFP4_BLOCK, Covers.MATRIX: 0.0}
        return sum(part.dtype.bits * shares[part.covers] for part in self.parts)

    def divides(self, rows: int, columns: int, block_rows: int) -> bool:
        """Whether a matrix [rows, columns] divides into whole blocks of `block_rows` x NVFP4_BLOCK."""
        return not self.blocked or (columns % NVFP4_BLOCK == 0 and rows % block_rows == 0)

    def part_names(self, weight: str) -> dict[str, str]:
        """Return part → name of the tensor that stores it for the weight called `weight`."""
        return {part.name: weight + part.suffix for part in self.parts}

    def bytes(self, weight: TensorType) -> int:
        """Return the bytes of a weight with its scales."""
        return sum(part.type(weight).bytes for part in self.parts)


_FP4_PARTS = (
    Part("codes", "", DType.F4E2M1, Covers.WEIGHT),
    Part("scale", "_scale", DType.F8E4M3, Covers.BLOCK),
    Part("scale_2", "_scale_2", DType.F32, Covers.MATRIX),
)
_FP8_PARTS = (Part("codes", "", DType.F8E4M3, Covers.WEIGHT), Part("scale", "_scale", DType.F32, Covers.MATRIX))

NVFP4 = WeightFormat("nvfp4", _FP4_PARTS, E2M1_MAX * E4M3_MAX, "w4a16_nvfp4", "NVFP4")
W4A16_NVFP4 = WeightFormat("w4a16_nvfp4", _FP4_PARTS, modelopt="W4A16_NVFP4")
FP8 = WeightFormat("fp8", _FP8_PARTS, E4M3_MAX, modelopt="FP8", uncalibrated_scale=1.0)
BF16 = WeightFormat("bf16", (Part("codes", "", DType.BF16, Covers.WEIGHT),))

FORMATS = {format_.name: format_ for format_ in (NVFP4, W4A16_NVFP4, FP8, BF16)}
"""Name → format."""


def as_bytes(codes: TensorType) -> TensorType:
    """Return the type of the same bytes as i8: of f8e4m3 [..., K] its dims, of f4e2m1 by blocks, [..., K/16, 8].

    So what reads a block finds its bytes by one index. ValueError for other types and where K is symbolic.
    """
    *outer, last = codes.dims
    if not isinstance(last, int):
        raise ValueError(f"{codes} has a symbolic last dim")
    if codes.dtype is DType.F4E2M1:
        return TensorType(DType.I8, (*outer, last // NVFP4_BLOCK, NVFP4_BLOCK // 2))
    if codes.dtype is DType.F8E4M3:
        return codes.with_dtype(DType.I8)
    raise ValueError(f"{codes} has no codes")
