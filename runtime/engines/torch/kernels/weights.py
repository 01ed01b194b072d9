"""Stored weights as numbers in registers.

E2M1 is s e e m and E4M3 is s e e e e m m m. Put where bfloat16 has its sign, the low bits of its exponent and the
high bits of its mantissa, both are their value times a power of two, numbers below the normal ones included:

    bits of bfloat16   s.....ee m......   e2m1(code) · 2^-126
                       s...eeee mmm....   e4m3(code) · 2^-120

so one instruction moves the sign of two codes and one their rest, for words of 32 bits that hold both. The power of
two goes elsewhere: into the activations, the block scale or the result, always exactly. Where products are computed
the result is far from the ends of float32's range.

Two shapes of them are needed: lane by lane for one row of activations (rows.py), tiles for more (tiles.py).
"""

import triton
import triton.language as tl

X_SCALE = tl.constexpr(2.0**60)
"""What activations are multiplied by, so that products with E2M1 and E4M3 codes do not vanish."""


@triton.jit
def pair_e2m1(word, PLACE: tl.constexpr):
    """Return the codes PLACE and PLACE + 4 of the eight in `word`, as two bfloat16 in 32 bits."""
    rest = word << (6 - 4 * PLACE) if PLACE < 2 else word >> (4 * PLACE - 6)
    return ((word << (12 - 4 * PLACE)) & 0x80008000) | (rest & 0x01C001C0)


@triton.jit
def pair_e4m3(word, PLACE: tl.constexpr):
    """Return the codes PLACE and PLACE + 2 of the four in `word`, as two bfloat16 in 32 bits."""
    rest = word << 4 if PLACE == 0 else word >> 4
    return ((word << (8 - 8 * PLACE)) & 0x80008000) | (rest & 0x07F007F0)


@triton.jit
def low(pair):
    """Return the lower bfloat16 of `pair` as float32."""
    return (pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def high(pair):
    """Return the upper bfloat16 of `pair` as float32."""
    return (pair & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def block_scale_bits(code):
    """Return the values of E4M3 codes times 2^-120 in float32, without their signs; higher bits may be anything."""
    return ((code.to(tl.uint32) & 0x7F) << 20).to(tl.float32, bitcast=True)


@triton.jit
def block_scale(code):
    """Return the values of E4M3 codes in float32, without their signs; higher bits may be anything."""
    return block_scale_bits(code) * 2.0**120
