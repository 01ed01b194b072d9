"""Codes bound as bytes, decoded by tables of 256 entries.

For types that cannot be gathered from (FP4), and for GPUs that lack them (FP4 before Blackwell, FP8
before Ada): a signed byte plus 128 is the index. From the gather to the sum all is one kernel.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as onnx

from n3c.backends.onnx.emitter import Emitter
from n3c.backends.onnx.graph import Array
from n3c.ir.formats import NVFP4_BLOCK

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""Code → value."""

_BYTES = np.arange(-128, 128) & 0xFF
"""Place in a table → the byte that stands there."""


def nibble_tables() -> tuple[Array, Array]:
    """Return byte + 128 → value of its low and of its high nibble as E2M1, float32 [256] each."""
    return E2M1[_BYTES & 15], E2M1[_BYTES >> 4]


def e4m3_table() -> Array:
    """Return byte + 128 → its value as E4M3, float32 [256]; the two codes of NaN, which no checkpoint has, give 0."""
    values = _BYTES.astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return np.where(np.isnan(values), np.float32(0), values)


def places(emitter: Emitter, codes: onnx.Value) -> onnx.Value:
    """Return where in a table the bytes `codes` are looked up."""
    g = emitter.graph
    return g.node("Add", g.node("Cast", codes, to=onnx.DataType.INT32), g.constant(np.array(128, np.int32)))


def e4m3(emitter: Emitter, codes: onnx.Value) -> onnx.Value:
    """Return E4M3 bytes in float32."""
    g = emitter.graph
    return g.node("Gather", g.constant(e4m3_table()), places(emitter, codes), axis=0)


def e2m1(emitter: Emitter, codes: onnx.Value, scales: onnx.Value) -> onnx.Value:
    """Return a whole weight in float32: the graph input `codes` i8 [..., N, K/2] times `scales` [..., N, K/16]."""
    g = emitter.graph
    *outer, half = (d for d in codes.shape or () if isinstance(d, int))
    pairs = g.node("Gather", g.constant(np.stack(nibble_tables(), axis=-1)), places(emitter, codes), axis=0)
    blocks = g.node("Reshape", pairs, g.i64(*outer, 2 * half // NVFP4_BLOCK, NVFP4_BLOCK))
    return g.node("Reshape", g.node("Mul", blocks, g.node("Unsqueeze", scales, g.i64(-1))), g.i64(*outer, 2 * half))


def e2m1_product(
    emitter: Emitter, x: onnx.Value, codes: onnx.Value, scales: onnx.Value, dims: tuple[int, ...]
) -> onnx.Value:
    """Σ over blocks and bytes of (low · x[even] + high · x[odd]) · scale.

    `codes` i8 [..., N, K/2] and `scales` float32 [..., N, K/16] meet `x` float32 [..., 1, K]; `dims` are
    [..., N, K] of the product before the sum. → [..., N].
    """
    g = emitter.graph
    *outer, width = dims
    index = places(emitter, codes)
    products = [
        g.node(
            "Mul",
            g.node("Gather", g.constant(table), index, axis=0),
            g.node("Slice", x, g.i64(first), g.i64(width), g.i64(-1), g.i64(2)),
        )
        for first, table in enumerate(nibble_tables())
    ]
    blocks = g.i64(*outer, width // NVFP4_BLOCK, NVFP4_BLOCK // 2)
    scaled = g.node("Mul", g.node("Reshape", g.node("Add", *products), blocks), g.node("Unsqueeze", scales, g.i64(-1)))
    return g.node("ReduceSum", scaled, g.i64(-2, -1), keepdims=0)
