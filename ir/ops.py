"""The ops: the alphabet of the IR.

An op is one function here. Its positional parameters are the operands, its keyword-only parameters
the attributes, its docstring the definition with the equation, its body the shape rule (ValueError
where operands do not fit), `flops` its cost, `weights` names the operands that hold weights, and
`continues` the op that it continues from a state. Backends only add how they spell it; the meaning
is fixed by the reference evaluation in `n3c.runtime.engines.reference`.

The letters of sizes are those of `n3c.specs.blocks`; a linear has sizes in and out. Arithmetic is float32
whatever the storage types are.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, cast

from .formats import NVFP4_BLOCK, as_bytes
from .op_definition import Attribute, Continues, Types, op, require
from .types import Dim, DType, TensorType

CACHE_MAX = 352.0
"""Largest value in an FP8 cache. E4M3 reaches 448, but two codes beyond 352 are no finite FP16 number, as which
engines write them."""


def _elements(type_: TensorType) -> int:
    return prod(d for d in type_.dims if isinstance(d, int))


def _matmul_flops(operands: Any, results: Types, attributes: Any) -> int:
    return 2 * _elements(results[0]) * int(operands["x"].dims[-1])


# ---------------------------------------------------------------------------------- ends of the model


@op()
def embedding(ids: TensorType, table: TensorType) -> TensorType:
    """y[b, s] = table[ids[b, s]]: ids i64 [B, S], table [V, D] → f32 [B, S, D]."""
    require(ids.dtype is DType.I64, f"ids must be i64, not {ids}")
    return TensorType(DType.F32, (*ids.dims, table.dims[-1]))


@op()
def shift_left(ids: TensorType) -> TensorType:
    """y[b, s] = ids[b, s + 1], and 0 at the last place: the next token of each, i64 [B, S]."""
    return ids


@op()
def last_token(x: TensorType, counts: TensorType) -> TensorType:
    """y[b, 0] = x[b, counts[b] - 1], and x[b, 0] where counts[b] = 0: x [B, S, D], counts i64 [B] → [B, 1, D]."""
    require(len(x.dims) == 3 and counts == TensorType(DType.I64, x.dims[:1]), f"counts {counts} do not fit {x}")
    return TensorType(x.dtype, (x.dims[0], 1, x.dims[2]))


# -------------------------------------------------------------------------------------- element-wise


@op()
def add(x: TensorType, y: TensorType) -> TensorType:
    """z = x + y, of equal shapes."""
    require(x.dims == y.dims, f"cannot add {x} and {y}")
    return x


@op()
def relu2(x: TensorType) -> TensorType:
    """y = max(x, 0)² (Primer, arXiv 2109.08668)."""
    return x


@op()
def concat(x: TensorType, y: TensorType) -> TensorType:
    """z = [x, y] along the last dim."""
    require(x.dims[:-1] == y.dims[:-1], f"cannot concatenate {x} and {y}")
    last = (x.dims[-1], y.dims[-1])
    require(all(isinstance(d, int) for d in last), "concat needs static last dims")
    return x.with_last(sum(d for d in last if isinstance(d, int)))


@op()
def split(x: TensorType, *, sizes: tuple[int, ...]) -> Types:
    """Cut x along the last dim into pieces of `sizes`."""
    require(x.dims[-1] == sum(sizes), f"cannot split {x} into {sizes}")
    return tuple(x.with_last(size) for size in sizes)


# --------------------------------------------------------------------------------------------- norms


@op()
def rms_norm(x: TensorType, weight: TensorType, *, eps: float) -> TensorType:
    """y = x / sqrt(mean(x²) + eps) · weight over the last dim (arXiv 1910.07467)."""
    require(weight.dims == x.dims[-1:], f"weight {weight} does not fit {x}")
    return x


@op()
def gated_rms_norm(x: TensorType, gate: TensorType, weight: TensorType, *, groups: int, eps: float) -> TensorType:
    """y = rms_norm(x · silu(gate)) · weight, the mean over each of `groups` equal parts of the last dim.

    The gate comes before the norm (`norm_before_gate=False` of mamba_ssm's RMSNormGated).
    """
    require(x.dims == gate.dims and weight.dims == x.dims[-1:], f"{gate} and {weight} do not fit {x}")
    require(isinstance(x.dims[-1], int) and x.dims[-1] % groups == 0, f"{x} does not divide into {groups} groups")
    return x


# ------------------------------------------------------------------------------------------- linears


@op(weights=("weight",), flops=_matmul_flops)
def linear(x: TensorType, weight: TensorType) -> TensorType:
    """y = x Wᵀ: x [..., in], weight W [out, in] → [..., out]. No bias: no linear of the family has one."""
    require(len(weight.dims) == 2 and weight.dims[1] == x.dims[-1], f"weight {weight} does not fit {x}")
    return x.with_last(weight.dims[0])


@op(weights=("weight",), flops=_matmul_flops)
def expert_linear(x: TensorType, indices: TensorType, weight: TensorType) -> TensorType:
    """y[b, s, k] = x[b, s, k or 0] W[indices[b, s, k]]ᵀ: the linears of the chosen experts.

    x [B, S, K or 1, in], indices i64 [B, S, K], weight W [E, out, in] → f32 [B, S, K, out].
    """
    require(len(x.dims) == 4 and len(weight.dims) == 3, f"expert_linear of {x} and {weight}")
    require(weight.dims[2] == x.dims[-1], f"weight {weight} does not fit {x}")
    require(x.dims[2] in (1, indices.dims[-1]), f"{x} does not fit indices {indices}")
    return TensorType(DType.F32, (*indices.dims, weight.dims[1]))


@op()
def dequantize_nvfp4(codes: TensorType, scale: TensorType, scale_2: TensorType) -> TensorType:
    """w[..., o, i] = e2m1(codes[..., o, i]) · scale[..., o, i/16] · scale_2[...].

    codes: f4e2m1 [..., out, in], or the same bytes by blocks as i8 [..., out, in/16, 8] (the low nibble of byte i
    is element 2i); scale: f8e4m3 [..., out, in/16], or the same bytes as i8; scale_2: f32 [] or [E]. The
    result is the exact product in float32. A 16x16 block repeats its scale in 16 rows, so both block
    shapes read alike.
    """
    require(codes.dtype in (DType.F4E2M1, DType.I8), f"codes must be f4e2m1 or i8, not {codes}")
    require(scale.dtype in (DType.F8E4M3, DType.I8), f"scale must be f8e4m3 or i8, not {scale}")
    *rows, blocks = scale.dims
    require(isinstance(blocks, int), "block scales need a static last dim")
    weight = TensorType(DType.F4E2M1, (*rows, int(blocks) * NVFP4_BLOCK))
    require(codes in (weight, as_bytes(weight)), f"scale {scale} does not fit {codes}")
    require(scale_2 == TensorType(DType.F32, weight.dims[:-2]), f"scale_2 {scale_2} does not fit {codes}")
    return weight.with_dtype(DType.F32)


@op()
def dequantize_fp8(codes: TensorType, scale: TensorType) -> TensorType:
    """w = codes · scale: codes f8e4m3 [..., out, in] or the same bytes as i8, scale f32 [] or [E] → f32."""
    require(codes.dtype in (DType.F8E4M3, DType.I8), f"codes must be f8e4m3 or i8, not {codes}")
    require(scale == TensorType(DType.F32, codes.dims[:-2]), f"scale {scale} does not fit {codes}")
    return codes.with_dtype(DType.F32)


@op()
def quantize_activation(x: TensorType, scale: TensorType, *, format: str) -> TensorType:
    """y = x as `format` holds it: x [..., K], scale f32 [] → [..., K], in float32.

    fp8: y = e4m3(x · (1 / scale)) · scale; beyond 448 · scale it is that.
    nvfp4: for each 16 elements along K x' = x · (1 / scale), s = e4m3(max|x'| / 6), y = e2m1(x' / s) · s · scale.
    """
    require(format in ("nvfp4", "fp8"), f"activations are quantized to nvfp4 or fp8, not {format}")
    require(scale == TensorType(DType.F32, ()), f"the scale of activations is f32[], not {scale}")
    last = x.dims[-1]
    require(format == "fp8" or (isinstance(last, int) and last % NVFP4_BLOCK == 0), f"{x} has no blocks of 16")
    return x


DEQUANTIZE = (dequantize_nvfp4, dequantize_fp8)
"""Ops that make a weight of codes and scales."""


# ----------------------------------------------------------------------------------------------- MoE


@op()
def route(
    logits: TensorType,
    bias: TensorType,
    *,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    scaling_factor: float,
) -> Types:
    """Choose experts: logits f32 [B, S, E], bias f32 [E] → indices i64 [B, S, K], weights f32 [B, S, K].

    s = sigmoid(logits); c = s + bias. With n_group > 1 the experts form equal groups, a group counts
    the sum of its two largest c, and only the `topk_group` best groups may be chosen from. indices =
    the top_k largest c (order free); weights = s[indices], divided by (their sum + 1e-20) where
    `norm_topk_prob`, times `scaling_factor`. (DeepSeek-V3, arXiv 2412.19437; the bias selects only.)
    """
    experts = logits.dims[-1]
    require(bias.dims == (experts,), f"bias {bias} does not fit {logits}")
    require(isinstance(experts, int) and top_k <= experts, f"top_k = {top_k} of {experts} experts")
    dims: tuple[Dim, ...] = (*logits.dims[:-1], top_k)
    return TensorType(DType.I64, dims), TensorType(DType.F32, dims)


def _experts_flops(operands: Any, results: Types, attributes: Any) -> int:
    up, down = operands["up"], operands["down"]
    return 2 * int(operands["indices"].dims[-1]) * (_elements(up) + _elements(down)) // int(up.dims[0])


@op(weights=("up", "down"), flops=_experts_flops)
def experts(
    x: TensorType,
    indices: TensorType,
    weights: TensorType,
    up: TensorType,
    down: TensorType,
    inner_scale: TensorType | None = None,
    *,
    inner_format: str,
) -> TensorType:
    """y = Σₖ weights[k] · down[e] relu²(up[e] x), e = indices[k].

    x [B, S, L], indices i64 and weights f32 [B, S, K], up [E, I, L], down [E, L, I] → [B, S, L],
    in whichever dispatch a backend prefers (sorted tokens and grouped GEMM in training). With `inner_scale` f32 []
    what `down` reads is quantized to `inner_format`, as by quantize_activation; else that is empty.
    """
    require((inner_scale is None) == (inner_format == ""), "inner_scale and inner_format go together")
    require(inner_scale is None or inner_scale == TensorType(DType.F32, ()), f"inner_scale is f32[], not {inner_scale}")
    require(len(up.dims) == 3 and up.dims[2] == x.dims[-1], f"up {up} does not fit {x}")
    require(down.dims == (up.dims[0], up.dims[2], up.dims[1]), f"down {down} does not fit up {up}")
    require(indices.dims == weights.dims, f"indices {indices} and weights {weights} differ")
    return x


@op()
def expand_experts(x: TensorType) -> TensorType:
    """x [B, S, L] → [B, S, 1, L]: one row for all chosen experts."""
    return TensorType(x.dtype, (*x.dims[:-1], 1, x.dims[-1]))


@op()
def combine_experts(y: TensorType, weights: TensorType) -> TensorType:
    """z[b, s] = Σₖ weights[b, s, k] · y[b, s, k]: y [B, S, K, L], weights f32 [B, S, K] → [B, S, L]."""
    require(weights.dims == y.dims[:-1], f"weights {weights} do not fit {y}")
    return TensorType(y.dtype, (*y.dims[:-2], y.dims[-1]))


# ------------------------------------------------------------------------------------------- Mamba-2


def _conv_flops(operands: Any, results: Types, attributes: Any) -> int:
    return 2 * _elements(results[0]) * int(operands["weight"].dims[-1])


@op(flops=_conv_flops)
def causal_conv1d(x: TensorType, weight: TensorType, bias: TensorType | None = None) -> TensorType:
    """y[:, s, c] = silu(Σⱼ weight[c, 0, j] · x[:, s - W + 1 + j, c] + bias[c]), x = 0 before the start.

    x [B, S, X], weight [X, 1, W], bias [X] → [B, S, X].
    """
    require(len(weight.dims) == 3 and weight.dims[:2] == (x.dims[-1], 1), f"weight {weight} does not fit {x}")
    require(bias is None or bias.dims == x.dims[-1:], f"bias {bias} does not fit {x}")
    return x


def _window_dims(operands: Mapping[str, TensorType | None], attributes: Any) -> tuple[Dim, ...]:
    weight = operands["weight"]
    assert weight is not None
    channels, _, taps = weight.static_dims
    return channels, taps - 1


@op(flops=_conv_flops, continues=Continues(causal_conv1d, "window", "conv", _window_dims))
def causal_conv1d_update(
    x: TensorType,
    window: TensorType,
    weight: TensorType,
    bias: TensorType | None = None,
    counts: TensorType | None = None,
) -> Types:
    """causal_conv1d of the tokens that follow a window, and the window after the first `counts` of them.

    x [B, S, X], window [B, X, W - 1] (the last W - 1 inputs, oldest first), counts i64 [B] in 0…S, S where
    left out → [B, S, X], window. What comes after the counted tokens does not change the window.
    """
    causal_conv1d.infer([x, weight, bias], {})
    width = weight.dims[-1]
    require(isinstance(width, int), "the convolution needs a static width")
    require(window.dims == (x.dims[0], x.dims[-1], int(width) - 1), f"window {window} does not fit {x} and {weight}")
    _require_counts(counts, x)
    return x, window


def _require_counts(counts: TensorType | None, x: TensorType) -> None:
    require(counts is None or counts == TensorType(DType.I64, x.dims[:1]), f"counts {counts} do not fit {x}")


def _ssd_flops(operands: Any, results: Types, attributes: Any) -> int:
    # per token and head: decay and update the state (3 P N), read it out (2 P N)
    return 5 * _elements(results[0]) * int(operands["B"].dims[-1]) // int(attributes["n_groups"])


@op(flops=_ssd_flops)
def ssd(
    x: TensorType,
    dt: TensorType,
    A: TensorType,
    B: TensorType,
    C: TensorType,
    D: TensorType,
    dt_bias: TensorType,
    *,
    n_groups: int,
    chunk_size: int,
) -> TensorType:
    """State space duality (Mamba-2, arXiv 2405.21060), from a zero state.

    δ = softplus(dt + dt_bias); h[s] = exp(δ A) h[s-1] + δ · x[s] ⊗ B[s]; y[s] = h[s] C[s] + D · x[s].
    x [B, S, H·P]; dt [B, S, H]; A (negative), D, dt_bias f32 [H]; B and C [B, S, G·N], head i uses
    group i // (H / G); h [B, H, P, N] → y [B, S, H·P]. `chunk_size` is how it is computed, not what.
    """
    heads = A.dims[0]
    require(dt.dims == (*x.dims[:-1], heads), f"dt {dt} does not fit {x} and A {A}")
    require(D.dims == A.dims and dt_bias.dims == A.dims, "A, D and dt_bias differ in heads")
    require(B.dims == C.dims, f"B {B} and C {C} differ")
    sizes = [d for d in (heads, x.dims[-1], B.dims[-1]) if isinstance(d, int)]
    require(len(sizes) == 3, "ssd needs static widths")
    require(
        sizes[1] % sizes[0] == 0 and sizes[0] % n_groups == 0 and sizes[2] % n_groups == 0, "ssd widths do not divide"
    )
    return x


def _ssd_dims(operands: Mapping[str, TensorType | None], attributes: Mapping[str, Attribute]) -> tuple[Dim, ...]:
    heads, channels, width = (int(cast("Any", operands[name]).dims[-1]) for name in ("A", "x", "B"))
    return heads, channels // heads, width // int(cast("int", attributes["n_groups"]))


@op(flops=_ssd_flops, continues=Continues(ssd, "state", "ssm", _ssd_dims))
def ssd_update(
    x: TensorType,
    dt: TensorType,
    A: TensorType,
    B: TensorType,
    C: TensorType,
    D: TensorType,
    dt_bias: TensorType,
    state: TensorType,
    counts: TensorType | None = None,
    *,
    n_groups: int,
    chunk_size: int,
) -> Types:
    """Continue ssd from a state, and return the state after the first `counts` tokens: h as [B, H, P, N].

    counts i64 [B] in 0…S, S where left out. A token after them has δ = 0, so it leaves h as it is; its y
    is of no use. In pieces of `chunk_size` tokens, with cᵢ = Σⱼ≤ᵢ δⱼ A:
    y[s] = exp(cₛ) h C[s] + Σᵢ≤ₛ exp(cₛ - cᵢ) δᵢ (C[s]·B[i]) x[i] + D x[s];
    h' = exp(c) h + Σᵢ exp(c - cᵢ) δᵢ x[i] ⊗ B[i].
    """
    ssd.infer([x, dt, A, B, C, D, dt_bias], {"n_groups": n_groups, "chunk_size": chunk_size})
    heads, channels, width = A.dims[0], x.dims[-1], B.dims[-1]
    assert isinstance(heads, int) and isinstance(channels, int) and isinstance(width, int)  # as ssd requires
    dims = (x.dims[0], heads, channels // heads, width // n_groups)
    require(state.dims == dims, f"state {state} does not fit {x} and B {B}: [B, H, P, N] is {list(dims)}")
    _require_counts(counts, x)
    return x, state


# ----------------------------------------------------------------------------------------- attention


@op()
def attention(q: TensorType, k: TensorType, v: TensorType, *, num_heads: int, num_kv_heads: int) -> TensorType:
    """Causal grouped-query attention without position encoding, scale 1 / sqrt(head_dim).

    q [B, S, J·Z], k and v [B, S, Y·Z]; query head i reads head i // (J / Y) → [B, S, J·Z].
    """
    sizes = [d for d in (q.dims[-1], k.dims[-1]) if isinstance(d, int)]
    require(len(sizes) == 2 and k.dims == v.dims, f"attention of {q}, {k}, {v}")
    require(num_heads % num_kv_heads == 0, f"{num_heads} heads over {num_kv_heads} key/value heads")
    require(sizes[0] * num_kv_heads == sizes[1] * num_heads, f"{q} and {k} differ in head_dim")
    return q


@op()
def write_cache(
    new: TensorType,
    cache: TensorType,
    lengths: TensorType,
    counts: TensorType | None = None,
    scale: TensorType | None = None,
) -> TensorType:
    """cache[b, :, lengths[b] + s] = new[b, s] for s < counts[b], as far as the cache reaches.

    new [B, S, Y·Z], cache [B, Y, C, Z] of capacity C, lengths i64 [B]: tokens already there, counts
    i64 [B] in 0…S, S where left out. Values are rounded to the type of the cache; with a scale f32 [] the
    cache holds new / scale (of an FP8 cache), clamped to ±352.
    """
    require(len(cache.dims) == 4 and cache.dims[0] == new.dims[0], f"cache {cache} does not fit {new}")
    sizes = [d for d in (new.dims[-1], cache.dims[1], cache.dims[3]) if isinstance(d, int)]
    require(len(sizes) == 3 and sizes[0] == sizes[1] * sizes[2], f"cache {cache} does not fit {new}")
    require(lengths == TensorType(DType.I64, new.dims[:1]), f"lengths {lengths} do not fit {new}")
    _require_counts(counts, new)
    require(scale is None or scale == TensorType(DType.F32, ()), f"the scale of a cache is f32[], not {scale}")
    return cache


@op()
def cached_attention(
    q: TensorType,
    k_cache: TensorType,
    v_cache: TensorType,
    lengths: TensorType,
    key_positions: TensorType,
    k_scale: TensorType | None = None,
    v_scale: TensorType | None = None,
    *,
    num_heads: int,
    num_kv_heads: int,
) -> TensorType:
    """Attend with token s of sequence b to the positions 0…lengths[b] + s of the caches.

    q [B, S, J·Z], caches [B, Y, C, Z], which hold the new tokens already, lengths i64 [B]: tokens before
    them → [B, S, J·Z]. key_positions i64 [end] = 0…end - 1 with lengths[b] + S ≤ end ≤ C: positions after
    it are not read, so that the cost follows end. What an FP8 cache holds is multiplied with its scale.
    """
    require(k_cache == v_cache, f"caches {k_cache} and {v_cache} differ")
    require(
        len(k_cache.dims) == 4 and k_cache.dims[:2] == (q.dims[0], num_kv_heads), f"cache {k_cache} does not fit {q}"
    )
    sizes = [d for d in (q.dims[-1], k_cache.dims[-1]) if isinstance(d, int)]
    require(len(sizes) == 2 and sizes[0] == num_heads * sizes[1], f"{q} has not {num_heads} heads of {k_cache}")
    require(num_heads % num_kv_heads == 0, f"{num_heads} heads over {num_kv_heads} key/value heads")
    require(lengths == TensorType(DType.I64, q.dims[:1]), f"lengths {lengths} do not fit {q}")
    require(key_positions.dtype is DType.I64 and len(key_positions.dims) == 1, f"key_positions are {key_positions}")
    for scale in (k_scale, v_scale):
        require(scale is None or scale == TensorType(DType.F32, ()), f"the scale of a cache is f32[], not {scale}")
    return q
