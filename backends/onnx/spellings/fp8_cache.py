"""An FP8 cache for engines whose in-place update takes no FP8.

TensorRT writes caches of 16- and 32-bit types in place, and nothing else. So the bytes are bound twice: as
FP16, two codes an element, which is what is written, and as E4M3, which is what is read. A call's own tokens are
not read back: what was written in this very call might not be seen under the other type. A pair of codes is
looked up in a table of all 65,536 FP16 bit patterns; codes of at most 352 make no pattern that means infinity
or not-a-number, which a kernel need not preserve.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as onnx

from n3c.backends.onnx.emitter import Emitter, Rows
from n3c.ir.ops import CACHE_MAX

from .one_token import scores, weighted

NEVER = -1e30
"""Score of a place that a query does not see; its exponential is 0, and no difference of two is not a number."""
LEAST_EXPONENT, GREATEST_EXPONENT = -6, 8
"""Of E4M3: a value below 2⁻⁶ is subnormal, one of 2⁸ or more has the last exponent."""


def rounded(emitter: Emitter, x: onnx.Value) -> onnx.Value:
    """Return float32 x as E4M3 holds it, in float32."""
    g = emitter.graph
    one = g.f32(1.0)
    clipped = g.node("Clip", x, g.f32(-CACHE_MAX), g.f32(CACHE_MAX))
    codes = g.node("QuantizeLinear", clipped, one, output_dtype=onnx.DataType.FLOAT8E4M3FN)
    return g.node("DequantizeLinear", codes, one)


def pairs(emitter: Emitter, values: onnx.Value, dims: tuple[int, ...]) -> onnx.Value:
    """Return values that E4M3 holds, float32 of `dims` [..., P], as FP16 [..., P/2] of the same bytes as their codes.

    code = 8 (e + 6) + |v| · 2^(3 - e) with e = max(-6, ⌊log2 |v|⌋), plus 128 for a negative value.
    """
    g = emitter.graph
    *outer, width = dims
    size = g.node("Abs", values)
    starts = g.constant((2.0 ** np.arange(LEAST_EXPONENT + 1, GREATEST_EXPONENT + 1)).astype(np.float32))
    reached = g.node("GreaterOrEqual", g.node("Unsqueeze", size, g.i64(-1)), starts)
    exponent = g.node("ReduceSum", g.node("Where", reached, g.f32(1.0), g.f32(0.0)), g.i64(-1), keepdims=0)
    unit = g.node("Pow", g.f32(2.0), g.node("Sub", g.f32(3.0 - LEAST_EXPONENT), exponent))
    code = g.node("Add", g.node("Mul", exponent, g.f32(8.0)), g.node("Mul", size, unit))
    sign = g.node("Where", g.node("Less", values, g.f32(0.0)), g.f32(128.0), g.f32(0.0))
    two = g.node("Reshape", g.node("Add", code, sign), g.i64(*outer, width // 2, 2))
    word = g.node("ReduceSum", g.node("Mul", two, g.constant(np.array([1, 256], np.float32))), g.i64(-1), keepdims=0)
    patterns = g.constant(np.arange(65536, dtype=np.uint16).view(np.float16))
    return g.node("Gather", patterns, g.node("Cast", word, to=onnx.DataType.INT32), axis=0)


def attend_one(
    emitter: Emitter, q: onnx.Value, keys: Rows, values: Rows, length: onnx.Value, before: onnx.Value, heads: int
) -> onnx.Value:
    """Return softmax(q k) v of one token, q float32 [B, Hkv, `heads`, P]; `before` [B, 1, 1, L]: where older ones are.

    The softmax over the cache and over the token itself with one maximum and one sum, so nothing is joined.
    """
    g = emitter.graph
    older = g.node("Where", before, scores(emitter, q, cut(emitter, keys, length, g.f32(1.0)), heads), g.f32(NEVER))
    own = g.node("ReduceSum", g.node("Mul", q, keys.values), g.i64(3), keepdims=1)
    peak = g.node("Max", g.node("ReduceMax", older, g.i64(-1), keepdims=1), own)
    older, own = (g.node("Exp", g.node("Sub", x, peak)) for x in (older, own))
    total = g.node("Add", g.node("ReduceSum", older, g.i64(-1), keepdims=1), own)
    of_older = weighted(emitter, older, cut(emitter, values, length, g.f32(1.0)))
    return g.node("Div", g.node("Add", of_older, g.node("Mul", own, values.values)), total)


def cut(emitter: Emitter, rows: Rows, length: onnx.Value, one: onnx.Value) -> onnx.Value:
    """Return what a cache held before the call, up to `length`, in the type of the constant `one`."""
    g = emitter.graph
    return g.node("Slice", g.node("DequantizeLinear", rows.before, one), g.i64(0), length, g.i64(2))
