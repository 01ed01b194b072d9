"""plan_state: turn the functions that train into functions that continue from a state, one set an entry point.

`forward` gives way to what serving calls, each with the tokens that it takes a sequence:
  decode   1                 the calls up to the logits
  prefill  prefill_chunk     the same over the `counts` valid tokens of a chunk, with logits of the last one;
                             with multi-token prediction also the caches of its block
  verify   1 + draft_tokens  logits of every token, while the states wait for what is accepted
  draft    1                 one step of multi-token prediction; `next_hidden` is its own next `hidden`
`verify` and `draft` exist where the model has an MTP block (whose layers never are recurrent), `verify` where
draft_tokens > 0 besides.

Patterns: causal_conv1d → causal_conv1d_update over a window; ssd → ssd_update over an SSM state;
attention → write_cache and cached_attention over caches, with the inputs `lengths` and `key_positions`.
In `verify` convolution and SSM state stay where they are: the operands of the call's tokens become
states too (*pending*), and the next call begins with the `accepted` ones of them. So a rejected draft
costs no copy of a state. After quantize, whose variants of functions it multiplies; before fuse_moe,
which picks the dispatch of experts by entry point.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from n3c.ir import ops
from n3c.ir.program import Call, EntryPoint, Function, Node, Origin, Parameter, Program, State, Value
from n3c.ir.source import CacheScale
from n3c.ir.types import Dim, DType, TensorType

Mode = Literal["decode", "prefill", "verify"]
"""How a function with memory continues: token by token, over counted tokens, or waiting for acceptance."""

EACH = TensorType(DType.I64, ("B",))
"""Type of lengths, counts and accepted."""
POSITIONS = TensorType(DType.I64, ("L",))
IDS = TensorType(DType.I64, ("B", "S"))
INPUTS = {
    "input_ids": IDS,
    "following_ids": IDS,
    "counts": EACH,
    "lengths": EACH,
    "accepted": EACH,
    "key_positions": POSITIONS,
}
"""What entry points may take, in this order."""
SCALES = ("mixer.k_proj.k_scale", "mixer.v_proj.v_scale")
"""Of FP8 caches, under ModelOpt's names."""
_KINDS = {"conv_state": "conv", "ssm_state": "ssm", "k_cache": "kv", "v_cache": "kv"}


@dataclass(frozen=True, slots=True)
class PlanState:
    """Make the entry points of serving out of `forward`."""

    name: ClassVar[str] = "plan_state"

    max_seq_len: int
    """Capacity of the key and value caches, in tokens."""
    kv_dtype: DType = DType.BF16
    ssm_dtype: DType = DType.F32
    conv_dtype: DType = DType.BF16
    prefill_chunk: int = 256
    draft_tokens: int = 3

    def run(self, program: Program) -> bool:
        """Replace `forward` and the functions with memory."""
        forward = program.entry_points.pop("forward")
        made = _Serving(self, program, forward)
        made.decode()
        made.prefill()
        if made.drafts:
            if self.draft_tokens:
                made.verify()
            made.draft()
        program.functions = made.functions
        program.states = dict(sorted(program.states.items(), key=lambda item: item[1].layer))
        return True


class _Serving:
    """The functions and entry points in the making."""

    def __init__(self, options: PlanState, program: Program, forward: EntryPoint) -> None:
        self.options, self.program, self.originals = options, program, program.functions
        self.functions: dict[str, Function] = {}
        self.main = _needed(forward, forward.outputs[0])
        self.logits, self.head = self.main[-1].outputs[0], self.main[-1]
        self.hidden = self.head.inputs[0]
        steps = _needed(forward, forward.outputs[1]) if len(forward.outputs) > 1 else []
        self.mtp = [call for call in steps if call not in self.main]
        self.drafts = bool(self.mtp)

    def decode(self) -> None:
        self.entry("decode", 1, [self.call(call, "decode") for call in self.main], [self.logits])

    def prefill(self) -> None:
        """The logits are those of the last valid token only, so the head reads its weight once a sequence."""
        calls = [self.call(call, "prefill", rename={self.hidden: "x_hidden"}) for call in self.main[:-1]]
        width = self.originals[self.head.function].inputs[0].type.dims[-1]
        label = self.main[-2].label
        calls.append(Call(self.last(width).name, label, ["x_hidden", "counts"], ["hidden"], []))
        head = replace(self.head, function=self.one_token(self.head.function).name, inputs=["hidden"])
        calls.append(head)
        outputs = [self.logits]
        if self.drafts:
            calls += self.predicted("prefill", {self.hidden: "x_hidden"})
            outputs.append("hidden")
        self.entry("prefill", self.options.prefill_chunk, calls, outputs)

    def verify(self) -> None:
        calls = [self.call(call, "verify") for call in self.main]
        calls += self.predicted("decode", {})
        self.entry("verify", 1 + self.options.draft_tokens, calls, [self.logits, self.hidden])

    def draft(self) -> None:
        first, *_, norm, head = self.mtp
        names = {first.outputs[0]: "x", norm.outputs[0]: "next_hidden", head.outputs[0]: "logits"}
        calls = [self.call(self.merge(first), "decode", rename=names | {"following_ids": "input_ids"})]
        calls += [self.call(call, "decode", rename=names) for call in self.mtp[1:]]
        width = self.originals[head.function].inputs[0].type.dims[-1]
        hidden = {"hidden": TensorType(DType.F32, ("B", "S", width))}
        self.entry("draft", 1, calls, ["logits", "next_hidden"], {first.inputs[1]: hidden["hidden"]})

    def entry(
        self,
        name: str,
        tokens: int,
        calls: list[Call],
        outputs: list[str],
        more: Mapping[str, TensorType] | None = None,
    ) -> None:
        """File an entry point; its inputs are what its calls read of `INPUTS` and `more`."""
        read = {value for call in calls for value in call.inputs}
        inputs = {value: type_ for value, type_ in {**INPUTS, **(more or {})}.items() if value in read}
        self.program.entry_points[name] = EntryPoint(name, inputs, calls, outputs, tokens)

    def predicted(self, mode: Mode, rename: Mapping[str, str]) -> list[Call]:
        """Return the calls that fill the states of the MTP block: up to the last that has any."""
        calls = [self.call(self.merge(self.mtp[0]), mode, rename=rename)]
        calls += [self.call(call, mode, rename=rename) for call in self.mtp[1:]]
        while calls and not calls[-1].states:
            calls.pop()
        if calls:
            function = self.functions[calls[-1].function]
            silent = f"{function.name}.states"
            if silent not in self.functions:
                self.functions[silent] = function.clone(silent)
                self.functions[silent].outputs = []
            calls[-1] = replace(calls[-1], function=silent, outputs=[])
        return calls

    def merge(self, call: Call) -> Call:
        """Return the first call of an MTP step with the token after each as its input, not shifted from the ids."""
        name = f"{call.function}.following"
        if name not in self.originals:
            function = self.originals[call.function].clone(name)
            for node in [n for n in function.nodes if n.op is ops.shift_left]:
                function.replace(node.results[0], node.operand(0))
                function.nodes.remove(node)
            function.outputs = function.outputs[:1]
            self.originals = {**self.originals, name: function}
        return replace(call, function=name, inputs=["following_ids", call.inputs[1]], outputs=call.outputs[:1])

    def call(self, call: Call, mode: Mode, *, rename: Mapping[str, str] | None = None) -> Call:
        """Return `call` continued from states, which it owns."""
        function = self.variant(self.originals[call.function], mode)
        known = len(call.inputs)
        states: list[str] = []
        for formal in function.states:
            name = f"{call.label}.{formal.name}"
            kind = _KINDS.get(formal.name, "pending")
            assert call.layer is not None
            self.program.states.setdefault(name, State(name, formal.type, kind, call.layer))
            states.append(name)
        scales = [f"{call.label}.{formal.name}" for formal in function.parameters if formal.name in SCALES]
        for name in scales:
            type_, role = TensorType(DType.F32, ()), "attention.cache_scale"
            self.program.parameters[name] = Parameter(name, type_, role, CacheScale(name), call.layer, format="f32")
        names = rename or {}
        return replace(
            call,
            function=function.name,
            inputs=[names.get(n, n) for n in call.inputs] + [v.name for v in function.inputs[known:]],
            outputs=[names.get(n, n) for n in call.outputs],
            parameters=[*call.parameters, *scales],
            states=states,
        )

    def variant(self, function: Function, mode: Mode) -> Function:
        """Return the form of `function` for `mode`; one without memory is its own."""
        memory = [node for node in function.nodes if node.op in (ops.causal_conv1d, ops.ssd, ops.attention)]
        if mode == "verify" and all(node.op is ops.attention for node in memory):
            mode = "decode"
        name = function.name if mode == "decode" or not memory else f"{function.name}.{mode}"
        if name not in self.functions:
            twin = function.clone(name)
            twin.origin = twin.origin.by(PlanState.name) if memory else twin.origin
            if memory:
                _Continued(self.options, twin, mode).run()
            self.functions[name] = twin
        return self.functions[name]

    def last(self, width: Dim) -> Function:
        """Return the function that picks the last valid token."""
        origin = self.originals[self.head.function].origin.by(PlanState.name)
        x, counts = Value("x", TensorType(DType.F32, ("B", "S", width))), Value("counts", EACH)
        function = Function("last_token", "last_token", [x, counts], [], origin=origin)
        function.outputs = [function.emit(ops.last_token, x, counts, name="y", origin=origin)]
        self.functions[function.name] = function
        return function

    def one_token(self, name: str) -> Function:
        """Return a function as it is for one token a sequence."""
        function = self.originals[name].clone(f"{name}.last")
        for value in function.values():
            value.type = value.type.bind({"S": 1})
        self.functions[function.name] = function
        return function


@dataclass(slots=True)
class _Continued:
    """The rewrite of one function with memory."""

    options: PlanState
    function: Function
    mode: Mode
    extra: dict[str, Value] = field(default_factory=dict[str, Value])

    def run(self) -> None:
        """Replace each op with memory; in `verify` the operands of convolution and SSD become states."""
        function = self.function
        nodes = {op: [n for n in function.nodes if n.op is op] for op in (ops.causal_conv1d, ops.ssd, ops.attention)}
        for node in nodes[ops.attention]:
            self.attention(node)
        for conv, ssd in zip(nodes[ops.causal_conv1d], nodes[ops.ssd], strict=True):
            if self.mode == "verify":
                self.waiting(conv, ssd)
            else:
                self.counted(conv, ssd)

    def input(self, name: str) -> Value:
        """Return an input of the function besides those that it had."""
        if name not in self.extra:
            self.extra[name] = Value(name, INPUTS[name])
            self.function.inputs.append(self.extra[name])
        return self.extra[name]

    def scale(self, name: str) -> Value:
        """Declare the scale of an FP8 cache, a parameter that the training program does not have."""
        value = Value(name, TensorType(DType.F32, ()))
        self.function.parameters.append(value)
        return value

    def state(self, name: str, dims: tuple[Dim, ...], dtype: DType) -> Value:
        """Declare a state of each sequence."""
        value = Value(name, TensorType(dtype, ("B", *dims)))
        self.function.states.append(value)
        return value

    def emit(
        self,
        at: Node,
        op: ops.OpDef,
        operands: Iterable[Value | None],
        names: list[str],
        attributes: Mapping[str, ops.Attribute],
    ) -> list[Value]:
        """Emit in front of `at`."""
        origin: Origin = at.origin.by(PlanState.name)
        place = self.function.nodes.index(at)
        return self.function.emit_many(op, list(operands), names, attributes, origin=origin, at=place)

    def put(self, node: Node, y: Value, states: Iterable[Value] = ()) -> None:
        """Let `y` take the place of what `node` gave, and return `states` as next states."""
        self.function.replace(node.results[0], y)
        self.function.next_states.extend(states)
        self.function.nodes.remove(node)

    def attention(self, node: Node) -> None:
        q, k, v = (node.operand(i) for i in range(3))
        kv_heads = node.attributes["num_kv_heads"]
        assert isinstance(kv_heads, int)
        dims = (kv_heads, self.options.max_seq_len, _width(k) // kv_heads)
        lengths = self.input("lengths")
        counts = self.input("counts") if self.mode == "prefill" else None
        caches = [self.state(name, dims, self.options.kv_dtype) for name in ("k_cache", "v_cache")]
        scales = [self.scale(name) for name in SCALES] if self.options.kv_dtype is DType.F8E4M3 else [None, None]
        after = [
            self.emit(node, ops.write_cache, [new, cache, lengths, counts, scale], [f"{cache.name}_next"], {})[0]
            for new, cache, scale in zip((k, v), caches, scales, strict=True)
        ]
        operands = [q, *after, lengths, self.input("key_positions"), *scales]
        y = self.emit(node, ops.cached_attention, operands, [node.results[0].name], node.attributes)
        self.put(node, y[0], after)

    def memories(self, conv: Node, ssd: Node) -> tuple[Value, Value]:
        """Declare window and SSM state."""
        channels, _, width = conv.operand(1).type.static_dims
        groups, (heads,) = ssd.attributes["n_groups"], ssd.operand(2).type.static_dims
        assert isinstance(groups, int)
        window = self.state("conv_state", (channels, width - 1), self.options.conv_dtype)
        dims = (heads, _width(ssd.operand(0)) // heads, _width(ssd.operand(3)) // groups)
        return window, self.state("ssm_state", dims, self.options.ssm_dtype)

    def counted(self, conv: Node, ssd: Node) -> None:
        window, state = self.memories(conv, ssd)
        counts = self.input("counts") if self.mode == "prefill" else None
        x, weight, bias = conv.operands
        names = [conv.results[0].name, "conv_state_next"]
        y, window = self.emit(conv, ops.causal_conv1d_update, [x, window, weight, bias, counts], names, {})
        self.put(conv, y, [window])
        names = [ssd.results[0].name, "ssm_state_next"]
        y, state = self.emit(ssd, ops.ssd_update, [*ssd.operands, state, counts], names, ssd.attributes)
        self.put(ssd, y, [state])

    def waiting(self, conv: Node, ssd: Node) -> None:
        """Commit the accepted pending tokens, then look at the new ones from there without keeping what they leave."""
        window, state = self.memories(conv, ssd)
        accepted = self.input("accepted")
        x, weight, bias = conv.operands
        dt = ssd.operand(1)
        assert x is not None
        pending_x = self.state("conv_pending", x.type.dims[1:], DType.F32)
        pending_dt = self.state("dt_pending", dt.type.dims[1:], DType.F32)
        operands = [pending_x, window, weight, bias, accepted]
        again, window = self.emit(conv, ops.causal_conv1d_update, operands, ["again", "conv_state_next"], {})
        pieces = self.replayed(conv, ssd, again)
        operands = [pieces.get(id(v), v) for v in ssd.operands]
        operands[1] = pending_dt
        _, state = self.emit(
            conv, ops.ssd_update, [*operands, state, accepted], ["again_y", "ssm_state_next"], ssd.attributes
        )
        operands = [x, window, weight, bias]
        y, _ = self.emit(conv, ops.causal_conv1d_update, operands, [conv.results[0].name, "ahead_window"], {})
        self.put(conv, y, [window, state])
        names = [ssd.results[0].name, "ahead_state"]
        y, _ = self.emit(ssd, ops.ssd_update, [*ssd.operands, state], names, ssd.attributes)
        self.put(ssd, y, [x, dt])

    def replayed(self, conv: Node, ssd: Node, again: Value) -> dict[int, Value | None]:
        """Cut `again` as the result of `conv` is cut into operands of `ssd`: operand → its piece of `again`."""
        (cut,) = {v.node for v in ssd.operands if v and v.node and conv.results[0] in v.node.operands}
        assert cut.op is ops.split
        names = [f"again_{v.name}" for v in cut.results]
        made = self.emit(conv, ops.split, [again], names, cut.attributes)
        return {id(old): new for old, new in zip(cut.results, made, strict=True)}


def _width(value: Value) -> int:
    """Return the last dim, which every op keeps static."""
    width = value.type.dims[-1]
    assert isinstance(width, int)
    return width


def _needed(entry: EntryPoint, output: str) -> list[Call]:
    """Return the calls that `output` depends on, in order."""
    needed, kept = {output}, list[Call]()
    for call in reversed(entry.calls):
        if needed.intersection(call.outputs):
            needed.update(call.inputs)
            kept.append(call)
    return kept[::-1]
