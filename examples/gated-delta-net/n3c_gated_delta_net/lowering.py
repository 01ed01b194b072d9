"""Lowering: the parameters and ops of a gated delta net."""

from __future__ import annotations

from n3c.ir import ops
from n3c.ir.program import Value
from n3c.ir.source import NegExp, Tensor
from n3c.ir.types import DType
from n3c.passes.lower.blocks import Block
from n3c.specs.schema import Spec

from .kind import GATED_DELTA_NET, GatedDeltaNet
from .ops import gated_delta, norm_then_gate, split_groups


def gated_delta_net(block: Block, spec: Spec, x: Value) -> Value:
    """Emit a gated delta net; each part of a projection stands key head by key head, as in Qwen3-Next."""
    table = spec.table(GATED_DELTA_NET)
    assert isinstance(table, GatedDeltaNet)
    keys, values, groups = table.key_size, table.value_size, table.num_key_heads
    of_values = table.shared * table.value_head_dim
    h = block.norm(x, "norm.weight")
    qkvz = block.projection(h, "gated_delta_net.in_proj_qkvz", 2 * (keys + values), "qkvz")
    ba = block.projection(h, "gated_delta_net.in_proj_ba", 2 * table.num_value_heads, "ba")
    sizes = (table.key_head_dim, table.key_head_dim, of_values, of_values)
    q, k, v, z = block.emit_many(split_groups, qkvz, names=["q", "k", "v", "z"], groups=groups, sizes=sizes)
    b, a = block.emit_many(split_groups, ba, names=["b", "a"], groups=groups, sizes=(table.shared, table.shared))

    qkv = block.emit(ops.concat, block.emit(ops.concat, q, k, name="qk"), v, name="qkv")
    taps = (2 * keys + values, 1, table.conv_kernel)
    conv = block.parameter(block.weight("gated_delta_net.conv1d"), taps, "gated_delta_net.conv1d")
    qkv = block.emit(ops.causal_conv1d, qkv, conv, None, name="qkv")
    q, k, v = block.emit_many(ops.split, qkv, names=["q", "k", "v"], sizes=(keys, keys, values))

    heads, role = (table.num_value_heads,), "gated_delta_net.decay"
    decay = block.parameter(
        "mixer.A", heads, role, dtype=DType.F32, source=lambda at: NegExp(Tensor(f"{at}.mixer.A_log"))
    )
    dt_bias = block.parameter("mixer.dt_bias", heads, role, dtype=DType.F32)
    y = block.emit(gated_delta, q, k, v, a, b, decay, dt_bias, name="y", num_key_heads=groups)
    weight = block.parameter("mixer.norm.weight", (table.value_head_dim,), "norm")
    y = block.emit(norm_then_gate, y, z, weight, name="y", eps=block.eps)
    return block.projection(y, "gated_delta_net.out_proj", spec.model.hidden_size, "o")
