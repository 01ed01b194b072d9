"""plan_state: turn the functions that train into functions that continue from a state, one set for each entry point.

`forward` gives way to what serving calls, each with the tokens that it takes a sequence:
  decode   1                 the calls up to the logits
  prefill  prefill_chunk     the same over the `counts` valid tokens of a chunk, with logits of the last one;
                             with multi-token prediction also the caches of its block
  verify   1 + draft_tokens  logits of every token, while the states wait for what is accepted
  draft    1                 one step of multi-token prediction; `next_hidden` is its own next `hidden`
`verify` and `draft` exist where the model has an MTP block (whose layers never are recurrent), `verify` where
draft_tokens > 0 besides.

How a function is made stateful is the module `rewrites/stateful`; where the states of a request lie is
`state_layout`. After quantize, whose variants of functions it multiplies; before fuse_moe, which picks the
dispatch of experts by entry point.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from n3c.ir import ops
from n3c.ir.program import Call, EntryPoint, Function, Parameter, Program, State, Value
from n3c.ir.rewrite import Builder
from n3c.ir.source import CacheScale
from n3c.ir.types import DType, TensorType

from .rewrites.stateful import INPUTS, KINDS, PER_SEQUENCE, SCALES, Mode, StateTypes, make_stateful, memory_ops

IDS = TensorType(DType.I64, ("B", "S"))


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
        serving = _Serving(self, program, forward)
        serving.decode()
        serving.prefill()
        if serving.mtp:
            if self.draft_tokens:
                serving.verify()
            serving.draft()
        program.functions = serving.functions
        program.states = dict(sorted(program.states.items(), key=lambda item: item[1].layer))
        return True


class _Serving:
    """Makes the entry points of serving, and the functions that they call."""

    def __init__(self, options: PlanState, program: Program, forward: EntryPoint) -> None:
        self.options, self.program, self.originals = options, program, program.functions
        self.types = StateTypes(options.max_seq_len, options.kv_dtype, options.ssm_dtype, options.conv_dtype)
        self.functions: dict[str, Function] = {}
        logits, *drafted = forward.outputs
        self.trunk = forward.needed([logits])
        self.head = self.trunk[-1]
        (self.hidden,), self.logits = self.head.inputs, logits
        first_step = forward.needed(drafted[:1])
        self.mtp = [call for call in first_step if call not in self.trunk]
        """The calls of the first step of multi-token prediction."""
        hidden = self.originals[self.head.function].inputs[0].type
        self.inputs = {"input_ids": IDS, "following_ids": IDS, **INPUTS, self.hidden: hidden}
        """Inputs that entry points may have, in this order."""

    def decode(self) -> None:
        self.file("decode", 1, [self.continued(call, "decode") for call in self.trunk], [self.logits])

    def prefill(self) -> None:
        """Only the last valid token gets logits, so the head reads its weight once a sequence."""
        whole = {self.hidden: "x_hidden"}  # `hidden` is that of the last valid token
        calls = [self.continued(call, "prefill", whole) for call in self.trunk[:-1]]
        calls.append(Call(self.last_token().name, calls[-1].label, ["x_hidden", "counts"], [self.hidden], []))
        calls.append(replace(self.head, function=self.for_one_token(self.head.function).name))
        outputs = [self.logits]
        if self.mtp:
            calls += self.filling("prefill", whole)
            outputs.append(self.hidden)
        self.file("prefill", self.options.prefill_chunk, calls, outputs)

    def verify(self) -> None:
        calls = [self.continued(call, "verify") for call in self.trunk]
        calls += self.filling("decode", {})
        self.file("verify", 1 + self.options.draft_tokens, calls, [self.logits, self.hidden])

    def draft(self) -> None:
        """Its input token is the one that follows the hidden state."""
        first, *rest = self.mtp
        *_, norm, head = rest
        names = {first.outputs[0]: "x", norm.outputs[0]: "next_hidden", head.outputs[0]: "logits"}
        calls = [self.continued(self.unshifted(first), "decode", names | {"following_ids": "input_ids"})]
        calls += [self.continued(call, "decode", names) for call in rest]
        self.file("draft", 1, calls, ["logits", "next_hidden"])

    def file(self, name: str, tokens: int, calls: list[Call], outputs: list[str]) -> None:
        """Add an entry point; its inputs are the values that its calls read and none of them computes."""
        read = {value for call in calls for value in call.inputs} - {value for call in calls for value in call.outputs}
        inputs = {value: type_ for value, type_ in self.inputs.items() if value in read}
        self.program.entry_points[name] = EntryPoint(name, inputs, calls, outputs, tokens)

    def filling(self, mode: Mode, rename: Mapping[str, str]) -> list[Call]:
        """Return the calls that fill the states of the MTP block: up to the last that has any, without its results."""
        first, *rest = self.mtp
        calls = [self.continued(call, mode, rename) for call in (self.unshifted(first), *rest)]
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

    def unshifted(self, call: Call) -> Call:
        """Return the first call of an MTP step with the token after each as its input, not shifted from the ids."""
        name = f"{call.function}.following"
        if name not in self.originals:
            function = self.originals[call.function].clone(name)
            for node in [n for n in function.nodes if n.op is ops.shift_left]:
                function.replace(node.results[0], node["ids"])
                function.nodes.remove(node)
            function.outputs = function.outputs[:1]
            self.originals = {**self.originals, name: function}
        _, hidden = call.inputs
        return replace(call, function=name, inputs=["following_ids", hidden], outputs=call.outputs[:1])

    def continued(self, call: Call, mode: Mode, rename: Mapping[str, str] | None = None) -> Call:
        """Return `call` continued from states, which it owns; `rename` gives values other names."""
        function = self.stateful(self.originals[call.function], mode)
        states = [self.state(call, formal) for formal in function.states]
        scales = [self.scale(call, formal) for formal in function.parameters if formal.name in SCALES]
        names = rename or {}
        return replace(
            call,
            function=function.name,
            inputs=[names.get(n, n) for n in call.inputs] + [v.name for v in function.inputs[len(call.inputs) :]],
            outputs=[names.get(n, n) for n in call.outputs],
            parameters=[*call.parameters, *scales],
            states=states,
        )

    def state(self, call: Call, formal: Value) -> str:
        """Return the name of the state that `call` binds to `formal`, which it shares with other entry points."""
        assert call.layer is not None
        state = State(f"{call.label}.{formal.name}", formal.type, KINDS.get(formal.name, "pending"), call.layer)
        return self.program.states.setdefault(state.name, state).name

    def scale(self, call: Call, formal: Value) -> str:
        """Return the name of the cache scale that `call` binds to `formal`."""
        name = f"{call.label}.{formal.name}"
        source, role = CacheScale(name), "attention.cache_scale"
        self.program.parameters[name] = Parameter(name, formal.type, role, source, call.layer, format="f32")
        return name

    def stateful(self, function: Function, mode: Mode) -> Function:
        """Return the form of `function` for `mode`: a copy of it where it has no memory."""
        memory = memory_ops(function)
        if mode == "verify" and memory <= {ops.attention}:
            mode = "decode"  # what is written beyond the length of a cache is never read
        name = function.name if mode == "decode" or not memory else f"{function.name}.{mode}"
        if name not in self.functions:
            twin = self.functions[name] = function.clone(name)
            if memory:
                twin.origin = twin.origin.by(PlanState.name)
                make_stateful(twin, mode, self.types, PlanState.name)
        return self.functions[name]

    def last_token(self) -> Function:
        """Return the function that picks the last valid token."""
        origin = self.originals[self.head.function].origin.by(PlanState.name)
        x, counts = Value("x", self.inputs[self.hidden]), Value("counts", PER_SEQUENCE)
        function = self.functions["last_token"] = Function("last_token", "last_token", [x, counts], [], origin=origin)
        function.outputs = [Builder(function, origin).emit(ops.last_token, x, counts, name="y")]
        return function

    def for_one_token(self, name: str) -> Function:
        """Return a function as it is for one token a sequence."""
        function = self.functions[f"{name}.last"] = self.originals[name].clone(f"{name}.last")
        for value in function.values():
            value.type = value.type.bind({"S": 1})
        return function
