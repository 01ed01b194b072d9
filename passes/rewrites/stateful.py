"""Stateful functions: ops with memory give way to ops that continue from a state.

    causal_conv1d → causal_conv1d_update over a window `conv_state`
    ssd           → ssd_update over `ssm_state`
    attention     → write_cache and cached_attention over `k_cache` and `v_cache`

Which op continues another is a property of ops (`Continues`), so this holds for those of extensions, too.

In the mode `verify` the window and the SSM state stay where they are: the operands of the call's tokens become
states too (*pending*), and the next call begins with the `accepted` ones of them. So a rejected draft costs no
copy of a state.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from n3c.ir import ops
from n3c.ir.op_definition import CONTINUED_BY, OpDef
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


@dataclass(frozen=True, slots=True)
class StateTypes:
    """How states are stored."""

    max_seq_len: int
    """Capacity of the key and value caches, in tokens."""
    kv_dtype: DType
    ssm_dtype: DType
    conv_dtype: DType


def memory_ops(function: Function) -> set[OpDef]:
    """Return the ops of `function` that look at more than one token."""
    return {node.op for node in function.nodes if node.op is ops.attention or node.op in CONTINUED_BY}


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
        nodes = list(self.function.nodes)
        for node in [node for node in nodes if node.op is ops.attention]:
            self.attention(node)
        recurrent = [node for node in nodes if node.op in CONTINUED_BY]
        if self.mode != "verify":
            for node in recurrent:
                self.continued(node)
            return
        scans = [node for node in recurrent if node.op is not ops.causal_conv1d]
        for scan in scans:
            self.verified(scan)

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

    def state_of(self, node: Node) -> Value:
        """Declare the state that `node` carries: `conv_state` or `ssm_state`."""
        update = CONTINUED_BY[node.op].continues
        assert update is not None
        types = {name: operand.type if operand else None for name, operand in node.named_operands.items()}
        dtype = self.types.conv_dtype if update.kind == "conv" else self.types.ssm_dtype
        return self.state(f"{update.kind}_state", update.dims(types, node.attributes), dtype)

    def continued(self, node: Node) -> None:
        """Continue from the state, and keep it as it is after the call's tokens."""
        state = self.state_of(node)
        y, following = self.updated(node, node, state, {"counts": self.counts()}, node.results[0].name)
        self.before(node).replace(node, y)
        self.keep([following])

    def verified(self, scan: Node) -> None:
        """Commit the accepted pending tokens, then compute the new ones from the committed states.

        States after the new tokens are dropped: only the operands of these are kept, pending. What a convolution
        gives to the scan is computed of its own pending operand.
        """
        conv, pieces = self.convolution_of(scan)
        chain = [scan] if conv is None else [conv, scan]
        states = [self.state_of(node) for node in chain]
        accepted = self.input("accepted")
        waiting = [] if conv is None else [("conv", conv["x"])]
        waiting += [(name, v) for name, v in scan.named_operands.items() if v and name not in pieces and _of_tokens(v)]
        pending = {name: self.state(f"{name}_pending", v.type.dims[1:], DType.F32) for name, v in waiting}
        first, changed, committed = chain[0], dict[str, Value | None](pending), list[Value]()
        if conv is not None:
            operands = {"x": changed.pop("conv"), "counts": accepted}
            replayed, window = self.updated(conv, conv, states[0], operands, "replayed")
            changed |= self.replayed_operands(conv, scan, replayed)
            committed.append(window)
        _, state = self.updated(first, scan, states[-1], {**changed, "counts": accepted}, "replayed_y")
        committed.append(state)
        for node, before in zip(chain, committed, strict=True):
            y, _ = self.updated(node, node, before, {}, node.results[0].name, dropped=True)
            self.before(node).replace(node, y)
        self.keep([*committed, *(value for _, value in waiting)])

    def updated(
        self, at: Node, node: Node, state: Value, changed: dict[str, Value | None], name: str, *, dropped: bool = False
    ) -> list[Value]:
        """Emit, in front of `at`, what continues `node` with `changed` operands: its result and the state after it."""
        op = CONTINUED_BY[node.op]
        assert op.continues is not None
        named = {**dict.fromkeys(op.operands), **node.named_operands, op.continues.state: state, **changed}
        kept = {"conv": "dropped_window", "ssm": "dropped_state"} if dropped else {}
        names = [name, kept.get(op.continues.kind, f"{op.continues.kind}_state_next")]
        return self.before(at).emit_many(op, *named.values(), names=names, **node.attributes)

    def convolution_of(self, scan: Node) -> tuple[Node | None, set[str]]:
        """Return the convolution of which a scan reads pieces, and the names of these operands."""
        pieces = {name: v for name, v in scan.named_operands.items() if v and v.node and v.node.op is ops.split}
        for conv in [node for node in self.function.nodes if node.op is ops.causal_conv1d]:
            of_it = {name for name, v in pieces.items() if v.node and conv.results[0] in v.node.operands}
            if of_it:
                return conv, of_it
        return None, set()

    def replayed_operands(self, conv: Node, scan: Node, replayed: Value) -> dict[str, Value]:
        """Cut `replayed` as the result of `conv` is cut: the operands of `scan` that are pieces of it, by name."""
        (cut,) = {v.node for v in scan.operands if v and v.node and conv.results[0] in v.node.operands}
        assert cut.op is ops.split
        names = [f"replayed_{piece.name}" for piece in cut.results]
        pieces = self.before(conv).emit_many(ops.split, replayed, names=names, **cut.attributes)
        made = {id(old): new for old, new in zip(cut.results, pieces, strict=True)}
        return {name: made[id(value)] for name, value in scan.named_operands.items() if id(value) in made}


def _of_tokens(value: Value) -> bool:
    return value.type.dims[:2] == ("B", "S")


def _width(value: Value) -> int:
    """Return the last dim, which every op keeps static."""
    width = value.type.dims[-1]
    assert isinstance(width, int)
    return width
