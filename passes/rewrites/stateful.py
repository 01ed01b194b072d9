"""Stateful functions: ops with memory give way to ops that continue from a state.

    causal_conv1d → causal_conv1d_update over a window `conv_state`
    ssd           → ssd_update over `ssm_state`
    attention     → write_cache and cached_attention over `k_cache` and `v_cache`

In the mode `verify` the window and the SSM state stay where they are: the operands of the call's tokens become
states too (*pending*), and the next call begins with the `accepted` ones of them. So a rejected draft costs no
copy of a state.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from n3c.ir import ops
from n3c.ir.program import Function, Node, Value
from n3c.ir.rewrite import Builder
from n3c.ir.types import Dim, DType, TensorType

Mode = Literal["decode", "prefill", "verify"]
"""How a function with memory continues: token by token, over counted tokens, or waiting for acceptance."""

PER_SEQUENCE = TensorType(DType.I64, ("B",))
"""Type of lengths, counts and accepted."""
INPUTS = {
    "counts": PER_SEQUENCE,
    "lengths": PER_SEQUENCE,
    "accepted": PER_SEQUENCE,
    "key_positions": TensorType(DType.I64, ("L",)),
}
"""Inputs that a stateful function may have besides those of its stateless form."""
KINDS = {"conv_state": "conv", "ssm_state": "ssm", "k_cache": "kv", "v_cache": "kv"}
"""States → their kinds; all others are pending operands."""
SCALES = ("mixer.k_proj.k_scale", "mixer.v_proj.v_scale")
"""Parameters that FP8 caches need and training has not, under ModelOpt's names."""
_MEMORY = (ops.causal_conv1d, ops.ssd, ops.attention)


@dataclass(frozen=True, slots=True)
class StateTypes:
    """How states are stored."""

    max_seq_len: int
    """Capacity of the key and value caches, in tokens."""
    kv_dtype: DType
    ssm_dtype: DType
    conv_dtype: DType


def memory_ops(function: Function) -> set[ops.OpDef]:
    """Return the ops of `function` that look at more than one token."""
    return {node.op for node in function.nodes if node.op in _MEMORY}


def make_stateful(function: Function, mode: Mode, types: StateTypes, made_by: str) -> None:
    """Rewrite every op with memory of `function`, in place."""
    _Stateful(function, mode, types, made_by).run()


@dataclass(slots=True)
class _Stateful:
    """The rewrite of one function."""

    function: Function
    mode: Mode
    types: StateTypes
    made_by: str
    added: dict[str, Value] = field(default_factory=dict[str, Value])
    """The additional inputs, by name."""

    def run(self) -> None:
        found = {op: [node for node in self.function.nodes if node.op is op] for op in _MEMORY}
        for node in found[ops.attention]:
            self.attention(node)
        for conv, ssd in zip(found[ops.causal_conv1d], found[ops.ssd], strict=True):
            if self.mode == "verify":
                self.mamba_verified(conv, ssd)
            else:
                self.mamba(conv, ssd)

    def input(self, name: str) -> Value:
        """Return an additional input, declared when it is first asked for."""
        if name not in self.added:
            self.added[name] = Value(name, INPUTS[name])
            self.function.inputs.append(self.added[name])
        return self.added[name]

    def counts(self) -> Value | None:
        """Return how many of the call's tokens count, None where all do."""
        return self.input("counts") if self.mode == "prefill" else None

    def scale(self, name: str) -> Value:
        """Declare the scale of an FP8 cache."""
        value = Value(name, TensorType(DType.F32, ()))
        self.function.parameters.append(value)
        return value

    def state(self, name: str, dims: tuple[Dim, ...], dtype: DType) -> Value:
        """Declare a state of each sequence."""
        value = Value(name, TensorType(dtype, ("B", *dims)))
        self.function.states.append(value)
        return value

    def before(self, node: Node) -> Builder:
        return Builder.before(self.function, node, self.made_by)

    def keep(self, states: Iterable[Value]) -> None:
        """Return `states` as next states, in the order in which the states were declared."""
        self.function.next_states.extend(states)

    def attention(self, node: Node) -> None:
        """Write keys and values into caches, and attend to what the caches hold."""
        kv_heads = node.attributes["num_kv_heads"]
        assert isinstance(kv_heads, int)
        dims = (kv_heads, self.types.max_seq_len, _width(node["k"]) // kv_heads)
        caches = [self.state(name, dims, self.types.kv_dtype) for name in ("k_cache", "v_cache")]
        scales = [self.scale(name) for name in SCALES] if self.types.kv_dtype is DType.F8E4M3 else [None, None]
        lengths, counts, build = self.input("lengths"), self.counts(), self.before(node)
        written = [
            build.emit(ops.write_cache, new, cache, lengths, counts, scale, name=f"{cache.name}_next")
            for new, cache, scale in zip((node["k"], node["v"]), caches, scales, strict=True)
        ]
        operands = (node["q"], *written, lengths, self.input("key_positions"), *scales)
        y = build.emit(ops.cached_attention, *operands, name=node.results[0].name, **node.attributes)
        build.replace(node, y)
        self.keep(written)

    def mamba_states(self, conv: Node, ssd: Node) -> tuple[Value, Value]:
        """Declare the window of the convolution [B, C, W - 1] and the SSM state [B, H, P, N]."""
        channels, _, width = conv["weight"].type.static_dims
        groups, (heads,) = ssd.attributes["n_groups"], ssd["A"].type.static_dims
        assert isinstance(groups, int)
        window = self.state("conv_state", (channels, width - 1), self.types.conv_dtype)
        dims = (heads, _width(ssd["x"]) // heads, _width(ssd["B"]) // groups)
        return window, self.state("ssm_state", dims, self.types.ssm_dtype)

    def mamba(self, conv: Node, ssd: Node) -> None:
        """Continue from window and SSM state, and keep both as they are after the call's tokens."""
        window, state = self.mamba_states(conv, ssd)
        counts = self.counts()
        y, next_window = self.convolved(conv, conv["x"], window, counts, [conv.results[0].name, "conv_state_next"])
        self.before(conv).replace(conv, y)
        names = [ssd.results[0].name, "ssm_state_next"]
        y, next_state = self.scanned(ssd, ssd, {"state": state, "counts": counts}, names)
        self.before(ssd).replace(ssd, y)
        self.keep([next_window, next_state])

    def mamba_verified(self, conv: Node, ssd: Node) -> None:
        """Commit the accepted pending tokens, then compute the new ones from the committed states.

        Window and SSM state after the new tokens are dropped: only the operands of these are kept, pending.
        """
        window, state = self.mamba_states(conv, ssd)
        accepted, x, dt = self.input("accepted"), conv["x"], ssd["dt"]
        pending_x = self.state("conv_pending", x.type.dims[1:], DType.F32)
        pending_dt = self.state("dt_pending", dt.type.dims[1:], DType.F32)
        replayed, committed_window = self.convolved(conv, pending_x, window, accepted, ["replayed", "conv_state_next"])
        operands = self.replayed_operands(conv, ssd, replayed)
        operands |= {"dt": pending_dt, "state": state, "counts": accepted}
        _, committed_state = self.scanned(conv, ssd, operands, ["replayed_y", "ssm_state_next"])

        y, _ = self.convolved(conv, x, committed_window, None, [conv.results[0].name, "dropped_window"])
        self.before(conv).replace(conv, y)
        y, _ = self.scanned(ssd, ssd, {"state": committed_state}, [ssd.results[0].name, "dropped_state"])
        self.before(ssd).replace(ssd, y)
        self.keep([committed_window, committed_state, x, dt])

    def convolved(self, conv: Node, x: Value, window: Value, counts: Value | None, names: list[str]) -> list[Value]:
        """Emit, in front of `conv`, its update over x from `window`: the result and the window after it."""
        operands = (x, window, conv["weight"], conv.get("bias"), counts)
        return self.before(conv).emit_many(ops.causal_conv1d_update, *operands, names=names)

    def scanned(self, at: Node, ssd: Node, changed: dict[str, Value | None], names: list[str]) -> list[Value]:
        """Emit, in front of `at`, the update of `ssd` with `changed` operands: the result and the state after it."""
        named = {**dict.fromkeys(ops.ssd_update.operands), **ssd.named_operands, **changed}
        return self.before(at).emit_many(ops.ssd_update, *named.values(), names=names, **ssd.attributes)

    def replayed_operands(self, conv: Node, ssd: Node, replayed: Value) -> dict[str, Value | None]:
        """Cut `replayed` as the result of `conv` is cut: the operands of `ssd` that are pieces of it, by name."""
        (cut,) = {v.node for v in ssd.operands if v and v.node and conv.results[0] in v.node.operands}
        assert cut.op is ops.split
        names = [f"replayed_{piece.name}" for piece in cut.results]
        pieces = self.before(conv).emit_many(ops.split, replayed, names=names, **cut.attributes)
        made = {id(old): new for old, new in zip(cut.results, pieces, strict=True)}
        return {name: made[id(value)] for name, value in ssd.named_operands.items() if id(value) in made}


def _width(value: Value) -> int:
    """Return the last dim, which every op keeps static."""
    width = value.type.dims[-1]
    assert isinstance(width, int)
    return width
