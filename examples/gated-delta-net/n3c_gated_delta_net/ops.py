"""The ops of a gated delta net that n3c itself does not have: shape rules, costs, and where the rest of each is.

Letters: Hk and Hv heads of keys and values, Dk and Dv their channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from n3c.ir.op_definition import Attribute, Continues, Types, op, require
from n3c.ir.types import DType, TensorType

_REFERENCE = "n3c_gated_delta_net.reference"
_ONNX = "n3c_gated_delta_net.onnx"


@op(reference=f"{_REFERENCE}:split_groups", spelling=f"{_ONNX}:split_groups")
def split_groups(x: TensorType, *, groups: int, sizes: tuple[int, ...]) -> Types:
    """Cut each of `groups` equal parts of x into pieces of `sizes`, and join the pieces of one place.

    x [..., groups · Σ sizes] → [..., groups · size] for each of the sizes.
    """
    require(x.dims[-1] == groups * sum(sizes), f"cannot split {x} into {groups} groups of {sizes}")
    return tuple(x.with_last(groups * size) for size in sizes)


@op(reference=f"{_REFERENCE}:norm_then_gate", spelling=f"{_ONNX}:norm_then_gate")
def norm_then_gate(x: TensorType, gate: TensorType, weight: TensorType, *, eps: float) -> TensorType:
    """y = rms_norm(x) · weight · silu(gate), the mean over each head: x and gate [..., Hv · Dv], weight [Dv]."""
    width, of_head = x.dims[-1], weight.dims[-1]
    require(x.dims == gate.dims, f"gate {gate} is not as {x}")
    require(isinstance(width, int) and isinstance(of_head, int) and width % of_head == 0, f"{weight} does not fit {x}")
    return x


def _flops(operands: Mapping[str, TensorType | None], results: Types, attributes: Mapping[str, Attribute]) -> int:
    # A token and head: decay the state, read it by the key, correct it, read it by the query.
    heads, key, value = _sizes(operands, attributes)
    return 7 * heads * key * value


def _sizes(operands: Mapping[str, TensorType | None], attributes: Mapping[str, Attribute]) -> tuple[int, int, int]:
    """Return Hv, Dk and Dv: the sizes of a state, and of the work."""
    heads, keys, values = (cast("int", cast("Any", operands[name]).dims[-1]) for name in ("A", "k", "v"))
    return heads, keys // cast("int", attributes["num_key_heads"]), values // heads


@op(flops=_flops, reference=f"{_REFERENCE}:gated_delta")
def gated_delta(
    q: TensorType,
    k: TensorType,
    v: TensorType,
    a: TensorType,
    b: TensorType,
    A: TensorType,
    dt_bias: TensorType,
    *,
    num_key_heads: int,
) -> TensorType:
    """The gated delta rule (arXiv 2412.06464), from a state of zeros.

    q̂ = q / |q| / sqrt(Dk), k̂ = k / |k|, g = A softplus(a + dt_bias), β = sigmoid(b);
    S' = exp(g[s]) S[s-1]; S[s] = S' + β[s] k̂[s] ⊗ (v[s] - S'ᵀ k̂[s]); y[s] = S[s]ᵀ q̂[s].
    q and k [B, S, Hk·Dk], v [B, S, Hv·Dv], a and b [B, S, Hv], A (negative) and dt_bias f32 [Hv]; value head i reads
    key i // (Hv / Hk); S [B, Hv, Dk, Dv] → y [B, S, Hv·Dv].
    """
    heads, keys, values = A.dims[-1], k.dims[-1], v.dims[-1]
    require(q == k, f"q {q} is not as k {k}")
    require(a == b and a.dims == (*v.dims[:-1], heads), f"a {a} and b {b} do not fit {v}")
    require(A.dims == dt_bias.dims, f"A {A} and dt_bias {dt_bias} differ in heads")
    sizes = [size for size in (heads, keys, values) if isinstance(size, int)]
    require(len(sizes) == 3, "gated_delta needs static widths")
    fits = sizes[0] % num_key_heads == 0 and sizes[1] % num_key_heads == 0 and sizes[2] % sizes[0] == 0
    require(fits, "gated_delta widths do not divide")
    return v


@op(
    flops=_flops,
    continues=Continues(gated_delta, "state", "ssm", _sizes),
    reference=f"{_REFERENCE}:gated_delta_update",
    spelling=f"{_ONNX}:gated_delta_update",
)
def gated_delta_update(
    q: TensorType,
    k: TensorType,
    v: TensorType,
    a: TensorType,
    b: TensorType,
    A: TensorType,
    dt_bias: TensorType,
    state: TensorType,
    counts: TensorType | None = None,
    *,
    num_key_heads: int,
) -> Types:
    """Continue gated_delta from a state [B, Hv, Dk, Dv], and return the state after the first `counts` tokens.

    counts i64 [B] in 0…S, S where left out: a token after them has g = 0 and β = 0.
    """
    operands = {"A": A, "k": k, "v": v}
    gated_delta.infer([q, k, v, a, b, A, dt_bias], {"num_key_heads": num_key_heads})
    dims = (v.dims[0], *_sizes(operands, {"num_key_heads": num_key_heads}))
    require(state.dims == dims, f"state {state} is not {list(dims)}")
    require(counts is None or counts == TensorType(DType.I64, v.dims[:1]), f"counts {counts} do not fit {v}")
    return v, state
