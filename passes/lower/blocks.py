"""Block kinds, lowered: each is one function that declares its parameters and emits its ops.

The record of a kind names its function (`BlockKind.lowering`); it returns what a block adds to the stream [B, S, D].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from n3c.ir import ops
from n3c.ir.op_definition import Attribute, OpDef
from n3c.ir.program import Function, Value
from n3c.ir.rewrite import Builder
from n3c.ir.source import NegExp, Source, Stack, Tensor
from n3c.ir.types import Dim, DType, TensorType
from n3c.specs.block_kind import BlockKind
from n3c.specs.schema import Spec


@dataclass(frozen=True, slots=True)
class Declaration:
    """A parameter as the block declares it; `{}` in the source stands for the block's label."""

    type: TensorType
    role: str
    source: Callable[[str], Source]
    buffer: bool


@dataclass(slots=True)
class Block:
    """A function under construction, with the declarations of its parameters."""

    function: Function
    eps: float
    kind: BlockKind | None = None
    """Of a residual block: its record has the names of the modules."""
    declarations: dict[str, Declaration] = field(default_factory=dict[str, Declaration])

    def parameter(
        self,
        name: str,
        dims: tuple[Dim, ...],
        role: str,
        *,
        dtype: DType = DType.BF16,
        source: Callable[[str], Source] | None = None,
        buffer: bool = False,
    ) -> Value:
        """Declare a parameter; without `source` it is the tensor of that name."""
        if self.kind is not None and role not in ("norm", *self.kind.roles, *self.kind.vectors.values()):
            raise KeyError(f"{role}: not a role of {self.kind.title} blocks")
        type_ = TensorType(dtype, dims)
        self.declarations[name] = Declaration(type_, role, source or (lambda label: Tensor(f"{label}.{name}")), buffer)
        value = Value(name, type_)
        self.function.parameters.append(value)
        return value

    def emit(self, op: OpDef, *operands: Value | None, name: str, **attributes: Attribute) -> Value:
        """Append a node with one result and return that; ValueError where the operands do not fit the op."""
        return self.emit_many(op, *operands, names=[name], **attributes)[0]

    def emit_many(self, op: OpDef, *operands: Value | None, names: list[str], **attributes: Attribute) -> list[Value]:
        """Append a node and return its results, one a name; ValueError where the operands do not fit the op."""
        return Builder(self.function, self.function.origin).emit_many(op, *operands, names=names, **attributes)

    def norm(self, x: Value, weight: str, role: str = "norm", name: str = "h") -> Value:
        """rms_norm with a declared weight."""
        return self.emit(ops.rms_norm, x, self.parameter(weight, x.type.dims[-1:], role), name=name, eps=self.eps)

    def linear(self, x: Value, weight: str, rows: int, role: str, name: str) -> Value:
        """Linear with a declared weight [rows, K]."""
        w = self.parameter(weight, (rows, x.type.dims[-1]), role)
        return self.emit(ops.linear, x, w, name=name)

    def projection(self, x: Value, role: str, rows: int, name: str) -> Value:
        """Linear of the mixer's module of `role`, with its weight [rows, K]."""
        return self.linear(x, self.weight(role), rows, role, name)

    def weight(self, role: str) -> str:
        """Return the name of a mixer's weight after the block's label; `*` stands for each expert."""
        assert self.kind is not None
        return f"mixer.{self.kind.module(role).name.replace('{}', '*')}.weight"


def mamba2(block: Block, spec: Spec, x: Value) -> Value:
    """Emit a Mamba-2 mixer."""
    m = spec.mamba
    assert m is not None
    d, g = m.inner_size, m.n_groups * m.state_size
    h = block.norm(x, "norm.weight")
    zxbcdt = block.projection(h, "mamba.in_proj", m.in_proj_size, "zxbcdt")
    z, xbc, dt = block.emit_many(ops.split, zxbcdt, names=["z", "xbc", "dt"], sizes=(d, m.conv_size, m.num_heads))
    conv = block.parameter(block.weight("mamba.conv1d"), (m.conv_size, 1, m.conv_kernel), "mamba.conv1d")
    bias = block.parameter("mixer.conv1d.bias", (m.conv_size,), "mamba.conv1d") if m.conv_bias else None
    xbc = block.emit(ops.causal_conv1d, xbc, conv, bias, name="xbc")
    u, b, c = block.emit_many(ops.split, xbc, names=["u", "b", "c"], sizes=(d, g, g))
    heads, f32 = (m.num_heads,), DType.F32
    a = block.parameter("mixer.A", heads, "mamba.ssm", dtype=f32, source=lambda at: NegExp(Tensor(f"{at}.mixer.A_log")))
    skip = block.parameter("mixer.D", heads, "mamba.ssm", dtype=f32)
    dt_bias = block.parameter("mixer.dt_bias", heads, "mamba.ssm", dtype=f32)
    y = block.emit(ops.ssd, u, dt, a, b, c, skip, dt_bias, name="y", n_groups=m.n_groups, chunk_size=m.chunk_size)
    weight = block.parameter("mixer.norm.weight", (d,), "norm")
    y = block.emit(ops.gated_rms_norm, y, z, weight, name="y", groups=m.n_groups, eps=block.eps)
    return block.projection(y, "mamba.out_proj", spec.model.hidden_size, "o")


def attention(block: Block, spec: Spec, x: Value) -> Value:
    """Emit grouped-query attention."""
    a = spec.attention
    assert a is not None
    h = block.norm(x, "norm.weight")
    q = block.projection(h, "attention.q_proj", a.num_heads * a.head_dim, "q")
    k = block.projection(h, "attention.k_proj", a.num_kv_heads * a.head_dim, "k")
    v = block.projection(h, "attention.v_proj", a.num_kv_heads * a.head_dim, "v")
    y = block.emit(ops.attention, q, k, v, name="y", num_heads=a.num_heads, num_kv_heads=a.num_kv_heads)
    return block.projection(y, "attention.o_proj", spec.model.hidden_size, "o")


def moe(block: Block, spec: Spec, x: Value) -> Value:
    """Emit a mixture of experts, with its shared expert."""
    m = spec.moe
    assert m is not None
    d, e, i = spec.model.hidden_size, m.num_experts, m.intermediate_size
    h = block.norm(x, "norm.weight")
    logits = block.projection(h, "moe.router", e, "logits")
    correction = block.parameter("mixer.gate.e_score_correction_bias", (e,), "moe.router", dtype=DType.F32, buffer=True)
    indices, weights = block.emit_many(
        ops.route,
        logits,
        correction,
        names=["indices", "weights"],
        top_k=m.top_k,
        n_group=m.n_group,
        topk_group=m.topk_group,
        norm_topk_prob=m.norm_topk_prob,
        scaling_factor=m.routed_scaling_factor,
    )
    u, width = h, d
    if m.latent_size is not None:
        u, width = block.projection(h, "moe.latent_down", m.latent_size, "u"), m.latent_size

    def experts(projection: str, dims: tuple[int, int, int]) -> Value:
        role = f"moe.experts.{projection}"
        name = block.weight(role)
        return block.parameter(name, dims, role, source=lambda at: Stack(f"{at}.{name}", e))

    up, down = experts("up", (e, i, width)), experts("down", (e, width, i))
    y = block.emit(ops.experts, u, indices, weights, up, down, name="y", inner_format="")
    if m.latent_size is not None:
        y = block.projection(y, "moe.latent_up", d, "y")
    if m.shared_intermediate_size:
        s = block.projection(h, "moe.shared.up", m.shared_intermediate_size, "s")
        s = block.emit(ops.relu2, s, name="s")
        s = block.projection(s, "moe.shared.down", d, "s")
        y = block.emit(ops.add, y, s, name="y")
    return y


def mlp(block: Block, spec: Spec, x: Value) -> Value:
    """Emit a dense MLP."""
    m = spec.mlp
    assert m is not None
    h = block.norm(x, "norm.weight")
    y = block.projection(h, "mlp.up", m.intermediate_size, "y")
    y = block.emit(ops.relu2, y, name="y")
    return block.projection(y, "mlp.down", spec.model.hidden_size, "y")
