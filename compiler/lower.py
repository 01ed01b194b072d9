"""Lowering: a spec becomes a program with the entry point `forward`, the model as it trains.

A block kind is one function here: it declares its parameters (name inside the block, shape, role,
source in the checkpoint) and emits its ops. Layers of one kind share the function; each call binds
the parameters of its layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from n3c.ir import ops
from n3c.ir.program import Call, EntryPoint, Function, Origin, Parameter, Program, Value
from n3c.ir.source import NegExp, Source, Stack, Tensor
from n3c.ir.types import Dim, DType, TensorType
from n3c.specs.pattern import BlockKind
from n3c.specs.schema import Spec

IDS = TensorType(DType.I64, ("B", "S"))


@dataclass(frozen=True, slots=True)
class _Declaration:
    """A parameter as the block declares it; `{}` in the source stands for the block's label."""

    type: TensorType
    role: str
    source: Callable[[str], Source]
    buffer: bool


@dataclass(slots=True)
class _Block:
    """A function in the making, and the declarations of its parameters."""

    function: Function
    eps: float
    declarations: dict[str, _Declaration] = field(default_factory=dict[str, _Declaration])

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
        type_ = TensorType(dtype, dims)
        self.declarations[name] = _Declaration(type_, role, source or (lambda label: Tensor(f"{label}.{name}")), buffer)
        value = Value(name, type_)
        self.function.parameters.append(value)
        return value

    def emit(self, op: ops.OpDef, *operands: Value | None, name: str, **attributes: ops.Attribute) -> Value:
        return self.emit_many(op, *operands, names=[name], **attributes)[0]

    def emit_many(
        self, op: ops.OpDef, *operands: Value | None, names: list[str], **attributes: ops.Attribute
    ) -> list[Value]:
        return self.function.emit_many(op, operands, names, attributes, origin=self.function.origin)

    def norm(self, x: Value, weight: str, role: str = "norm", name: str = "h") -> Value:
        """rms_norm with a declared weight."""
        return self.emit(ops.rms_norm, x, self.parameter(weight, x.type.dims[-1:], role), name=name, eps=self.eps)

    def linear(self, x: Value, weight: str, rows: int, role: str, name: str) -> Value:
        """Linear with a declared weight [rows, K]."""
        w = self.parameter(weight, (rows, x.type.dims[-1]), role)
        return self.emit(ops.linear, x, w, name=name)


def _mamba2(block: _Block, spec: Spec, x: Value) -> Value:
    m = spec.mamba
    assert m is not None
    d, g = m.inner_size, m.n_groups * m.state_size
    h = block.norm(x, "norm.weight")
    zxbcdt = block.linear(h, "mixer.in_proj.weight", m.in_proj_size, "mamba.in_proj", "zxbcdt")
    z, xbc, dt = block.emit_many(ops.split, zxbcdt, names=["z", "xbc", "dt"], sizes=(d, m.conv_size, m.num_heads))
    conv = block.parameter("mixer.conv1d.weight", (m.conv_size, 1, m.conv_kernel), "mamba.conv1d")
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
    return block.linear(y, "mixer.out_proj.weight", spec.model.hidden_size, "mamba.out_proj", "o")


def _attention(block: _Block, spec: Spec, x: Value) -> Value:
    a = spec.attention
    assert a is not None
    h = block.norm(x, "norm.weight")
    q = block.linear(h, "mixer.q_proj.weight", a.num_heads * a.head_dim, "attention.q_proj", "q")
    k = block.linear(h, "mixer.k_proj.weight", a.num_kv_heads * a.head_dim, "attention.k_proj", "k")
    v = block.linear(h, "mixer.v_proj.weight", a.num_kv_heads * a.head_dim, "attention.v_proj", "v")
    y = block.emit(ops.attention, q, k, v, name="y", num_heads=a.num_heads, num_kv_heads=a.num_kv_heads)
    return block.linear(y, "mixer.o_proj.weight", spec.model.hidden_size, "attention.o_proj", "o")


def _moe(block: _Block, spec: Spec, x: Value) -> Value:
    m = spec.moe
    assert m is not None
    d, e, i = spec.model.hidden_size, m.num_experts, m.intermediate_size
    h = block.norm(x, "norm.weight")
    logits = block.linear(h, "mixer.gate.weight", e, "moe.router", "logits")
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
        u, width = block.linear(h, "mixer.fc1_latent_proj.weight", m.latent_size, "moe.latent_down", "u"), m.latent_size

    def experts(projection: str, dims: tuple[int, int, int]) -> Value:
        name = f"mixer.experts.*.{projection}_proj.weight"
        return block.parameter(name, dims, f"moe.experts.{projection}", source=lambda at: Stack(f"{at}.{name}", e))

    up, down = experts("up", (e, i, width)), experts("down", (e, width, i))
    y = block.emit(ops.experts, u, indices, weights, up, down, name="y")
    if m.latent_size is not None:
        y = block.linear(y, "mixer.fc2_latent_proj.weight", d, "moe.latent_up", "y")
    if m.shared_intermediate_size:
        s = block.linear(h, "mixer.shared_experts.up_proj.weight", m.shared_intermediate_size, "moe.shared.up", "s")
        s = block.emit(ops.relu2, s, name="s")
        s = block.linear(s, "mixer.shared_experts.down_proj.weight", d, "moe.shared.down", "s")
        y = block.emit(ops.add, y, s, name="y")
    return y


def _mlp(block: _Block, spec: Spec, x: Value) -> Value:
    m = spec.mlp
    assert m is not None
    h = block.norm(x, "norm.weight")
    y = block.linear(h, "mixer.up_proj.weight", m.intermediate_size, "mlp.up", "y")
    y = block.emit(ops.relu2, y, name="y")
    return block.linear(y, "mixer.down_proj.weight", spec.model.hidden_size, "mlp.down", "y")


_BLOCKS: dict[BlockKind, tuple[str, Callable[[_Block, Spec, Value], Value]]] = {
    BlockKind.MAMBA: ("mamba2", _mamba2),
    BlockKind.ATTENTION: ("attention", _attention),
    BlockKind.MOE: ("moe", _moe),
    BlockKind.MLP: ("mlp", _mlp),
}


def lower(spec: Spec) -> Program:
    """Return the program of `spec`: activations float32 [B, S, D], weights in their stored types."""
    return _Lowering(spec).run()


class _Lowering:
    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.program = Program(spec.name)
        self.entry = EntryPoint("forward", {"input_ids": IDS}, [], [])
        self.program.entry_points["forward"] = self.entry
        self.blocks: dict[str, _Block] = {}
        self.x = TensorType(DType.F32, ("B", "S", spec.model.hidden_size))

    def run(self) -> Program:
        model = self.spec.model
        embedding = self.end("embedding", [Value("ids", IDS)], "model.vocab_size")
        table = embedding.parameter("weight", (model.vocab_size, model.hidden_size), "embedding")
        embedding.function.outputs = [embedding.emit(ops.embedding, embedding.function.inputs[0], table, name="x")]
        self.call("embedding", "backbone.embeddings", ["input_ids"], ["x0"])

        for i, kind in enumerate(model.pattern):
            span_path = f"model.pattern.{i}"
            self.residual(kind, f"backbone.layers.{i}", f"x{i}", f"x{i + 1}", layer=i, span_path=span_path)

        norm = self.end("norm", [Value("x", self.x)], "model.norm_eps")
        norm.function.outputs = [norm.norm(norm.function.inputs[0], "weight")]
        self.call("norm", "backbone.norm_f", [f"x{len(model.pattern)}"], ["hidden"])

        head = self.end("head", [Value("x", self.x)], "model.tie_word_embeddings")
        tied = model.tie_word_embeddings
        head.function.outputs = [
            head.linear(
                head.function.inputs[0], "weight", model.vocab_size, "embedding" if tied else "lm_head", "logits"
            )
        ]
        self.call("head", self.head_label, ["hidden"], ["logits"])
        self.entry.outputs.append("logits")
        if self.spec.mtp is not None:
            self.mtp()
        return self.program

    @property
    def head_label(self) -> str:
        return "backbone.embeddings" if self.spec.model.tie_word_embeddings else "lm_head"

    def mtp(self) -> None:
        """One set of weights applied `depth` times: each step reads the hidden states of the last one."""
        mtp = self.spec.mtp
        assert mtp is not None
        first, last = "mtp.layers.0", f"mtp.layers.{len(mtp.pattern) - 1}"
        start = self.end("mtp_input", [Value("ids", IDS), Value("hidden", self.x)], "mtp")
        ids, hidden = start.function.inputs
        following = start.emit(ops.shift_left, ids, name="following")
        width = self.spec.model.hidden_size
        table = start.parameter(
            "embeddings.weight",
            (self.spec.model.vocab_size, width),
            "embedding",
            source=lambda _: Tensor("backbone.embeddings.weight"),
        )
        e = start.emit(ops.embedding, following, table, name="e")
        e = start.norm(e, "enorm.weight", "norm", "e")
        h = start.norm(hidden, "hnorm.weight", "norm", "h")
        joined = start.emit(ops.concat, e, h, name="eh")
        start.function.outputs = [start.linear(joined, "eh_proj.weight", width, "eh_proj", "x"), following]
        end = self.end("mtp_norm", [Value("x", self.x)], "mtp")
        end.function.outputs = [end.norm(end.function.inputs[0], "final_layernorm.weight")]

        ids_name, hidden_name, base = "input_ids", "hidden", len(self.spec.model.pattern)
        for depth in range(mtp.depth):
            at = f"mtp{depth}"
            self.call("mtp_input", first, [ids_name, hidden_name], [f"{at}.x0", f"{at}.ids"], role_prefix="mtp.")
            for i, kind in enumerate(mtp.pattern):
                label, span_path = f"mtp.layers.{i}", f"mtp.pattern.{i}"
                self.residual(kind, label, f"{at}.x{i}", f"{at}.x{i + 1}", layer=base + i, span_path=span_path)
            self.call("mtp_norm", last, [f"{at}.x{len(mtp.pattern)}"], [f"{at}.hidden"], role_prefix="mtp.")
            self.call("head", self.head_label, [f"{at}.hidden"], [f"{at}.logits"])
            self.entry.outputs.append(f"{at}.logits")
            ids_name, hidden_name = f"{at}.ids", f"{at}.hidden"

    def end(self, kind: str, inputs: list[Value], span_path: str) -> _Block:
        """Start a function that is not a residual block."""
        function = Function(kind, kind, inputs, [], origin=Origin(self.spec.span(span_path)))
        self.program.functions[kind] = function
        self.blocks[kind] = _Block(function, self.spec.model.norm_eps)
        return self.blocks[kind]

    def residual(self, kind: BlockKind, label: str, x: str, y: str, *, layer: int, span_path: str) -> None:
        """Call the residual block x + mixer(norm(x)) of `kind`; its function is built on first use."""
        name, build = _BLOCKS[kind]
        if name not in self.blocks:
            block = self.end(name, [Value("x", self.x)], span_path)
            inner = build(block, self.spec, block.function.inputs[0])
            block.function.outputs = [block.emit(ops.add, block.function.inputs[0], inner, name="out")]
        prefix = "mtp." if label.startswith("mtp.") else ""
        self.call(name, label, [x], [y], layer=layer, role_prefix=prefix, span_path=span_path)

    def call(
        self,
        name: str,
        label: str,
        inputs: list[str],
        outputs: list[str],
        *,
        layer: int | None = None,
        role_prefix: str = "",
        span_path: str | None = None,
    ) -> None:
        """Append a call and file the parameters that it binds under their names in the checkpoint."""
        block = self.blocks[name]
        origin = Origin(self.spec.span(span_path)) if span_path else block.function.origin
        bound: list[str] = []
        for formal, declared in block.declarations.items():
            source = declared.source(label)
            shared = isinstance(source, Tensor) and source.name in self.program.parameters
            actual = source.name if shared and isinstance(source, Tensor) else f"{label}.{formal}"
            if actual not in self.program.parameters:
                role = declared.role if declared.role in ("embedding", "lm_head") else role_prefix + declared.role
                self.program.parameters[actual] = Parameter(
                    actual, declared.type, role, source, layer, buffer=declared.buffer, origin=origin
                )
            bound.append(actual)
        self.entry.calls.append(Call(name, label, inputs, outputs, bound, layer=layer, origin=origin))
