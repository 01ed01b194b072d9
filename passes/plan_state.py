"""plan_state: turn the functions that train into functions that continue from a state.

Patterns: causal_conv1d → causal_conv1d_update over a window; ssd → ssd_update over an SSM state;
attention → cached_attention over key and value caches and the input `lengths`. `forward` gives way
to `decode`: the same calls up to the logits, without multi-token prediction, each owning its states.
`state_plan` then lays the states of one request out in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from n3c.ir import ops
from n3c.ir.program import Call, EntryPoint, Function, Node, Program, State, Value
from n3c.ir.types import Dim, DType, TensorType

LENGTHS = TensorType(DType.I64, ("B",))
ALIGNMENT = 256
"""Bytes: states begin on these, as device allocators give."""


@dataclass(frozen=True, slots=True)
class PlanState:
    """Make the entry point `decode` of `forward`."""

    name: ClassVar[str] = "plan_state"

    max_seq_len: int
    """Capacity of the key and value caches, in tokens."""
    kv_dtype: DType = DType.BF16
    ssm_dtype: DType = DType.F32
    conv_dtype: DType = DType.BF16

    def run(self, program: Program) -> bool:
        """Rewrite functions in place and replace `forward`."""
        forward = program.entry_points.pop("forward")
        takes_lengths = {f.name for f in program.functions.values() if self._rewrite(f)}
        calls = _needed(forward, "logits")
        for call in calls:
            function = program.functions[call.function]
            if call.function in takes_lengths:
                call.inputs.append("lengths")
            assert call.layer is not None or not function.states
            for formal in function.states:
                name = f"{call.label}.{formal.name}"
                program.states[name] = State(name, formal.type, _KINDS[formal.name], call.layer or 0)
                call.states.append(name)
        inputs = {**forward.inputs, "lengths": LENGTHS}
        program.entry_points["decode"] = EntryPoint("decode", inputs, calls, ["logits"])
        return True

    def _rewrite(self, function: Function) -> bool:
        """Rewrite the ops with memory; return whether the function now takes `lengths`."""
        lengths: Value | None = None
        for node in list(function.nodes):
            if node.op is ops.causal_conv1d:
                channels, _, width = node.operand(1).type.static_dims
                window = self._state("conv_state", (channels, width - 1), self.conv_dtype)
                x, weight, bias = node.operands
                self._update(function, node, ops.causal_conv1d_update, [x, window, weight, bias], [window])
            elif node.op is ops.ssd:
                groups = node.attributes["n_groups"]
                (heads,), inner, outer = node.operand(2).type.static_dims, _width(node, 0), _width(node, 3)
                assert isinstance(groups, int)
                state = self._state("ssm_state", (heads, inner // heads, outer // groups), self.ssm_dtype)
                self._update(function, node, ops.ssd_update, [*node.operands, state], [state], {"n_groups": groups})
            elif node.op is ops.attention:
                lengths = Value("lengths", LENGTHS)
                function.inputs.append(lengths)
                kv_heads = node.attributes["num_kv_heads"]
                assert isinstance(kv_heads, int)
                dims = (kv_heads, self.max_seq_len, _width(node, 1) // kv_heads)
                caches = [self._state(name, dims, self.kv_dtype) for name in ("k_cache", "v_cache")]
                operands = [*node.operands, *caches, lengths]
                self._update(function, node, ops.cached_attention, operands, caches, node.attributes)
        return lengths is not None

    def _state(self, name: str, dims: tuple[int, ...], dtype: DType) -> Value:
        batch: tuple[Dim, ...] = ("B",)
        return Value(name, TensorType(dtype, batch + dims))

    def _update(
        self,
        function: Function,
        node: Node,
        op: ops.OpDef,
        operands: Sequence[Value | None],
        states: list[Value],
        attributes: Mapping[str, ops.Attribute] | None = None,
    ) -> None:
        function.states.extend(states)
        names = [node.results[0].name, *(f"{state.name}_next" for state in states)]
        at = function.nodes.index(node)
        y, *following = function.emit_many(op, operands, names, attributes, origin=node.origin.by(self.name), at=at)
        function.replace(node.results[0], y)
        function.next_states.extend(following)
        function.nodes.remove(node)


def _width(node: Node, operand: int) -> int:
    """Return the last dim of an operand, which every op keeps static."""
    width = node.operand(operand).type.dims[-1]
    assert isinstance(width, int)
    return width


_KINDS = {"conv_state": "conv", "ssm_state": "ssm", "k_cache": "kv", "v_cache": "kv"}


def _needed(entry: EntryPoint, output: str) -> list[Call]:
    """Return the calls that `output` depends on, in order."""
    needed, kept = {output}, list[Call]()
    for call in reversed(entry.calls):
        if needed.intersection(call.outputs):
            needed.update(call.inputs)
            kept.append(call)
    return kept[::-1]


@dataclass(frozen=True, slots=True)
class PlannedState:
    """A state of one request: its place in the request's memory. Sizes in bytes."""

    name: str
    kind: str
    layer: int
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    offset: int


@dataclass(frozen=True, slots=True)
class StatePlan:
    """The states of one request in one piece of memory, each on a boundary of `ALIGNMENT` bytes."""

    states: tuple[PlannedState, ...]
    max_seq_len: int
    total_bytes: int
    """With padding; what a runtime allocates a request."""
    kv_bytes_per_token: int
    ssm_bytes: int
    conv_bytes: int

    @property
    def bytes_per_request(self) -> int:
        """What does not grow with context: SSM states and convolution windows."""
        return self.ssm_bytes + self.conv_bytes

    def as_json(self) -> dict[str, Any]:
        """Return the form of `manifest.json`, key `state_plan`."""
        return {
            "max_seq_len": self.max_seq_len,
            "alignment": ALIGNMENT,
            "total_bytes": self.total_bytes,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "bytes_per_request": self.bytes_per_request,
            "ssm_bytes_per_request": self.ssm_bytes,
            "conv_bytes_per_request": self.conv_bytes,
            "states": [
                {
                    "name": s.name,
                    "kind": s.kind,
                    "layer": s.layer,
                    "dtype": s.dtype,
                    "shape": list(s.shape),
                    "bytes": s.bytes,
                    "offset": s.offset,
                }
                for s in self.states
            ],
        }


def state_plan(program: Program, max_seq_len: int) -> StatePlan:
    """Lay out the states of one request in the order of layers. `program` must have `decode`."""
    planned: list[PlannedState] = []
    totals = {"kv": 0, "ssm": 0, "conv": 0}
    end = 0
    for state in program.states.values():
        type_ = state.type.bind({"B": 1})
        planned.append(
            PlannedState(
                state.name, state.kind, state.layer, type_.dtype.value, type_.static_dims[1:], type_.bytes, end
            )
        )
        totals[state.kind] += type_.bytes
        end += -(-type_.bytes // ALIGNMENT) * ALIGNMENT
    return StatePlan(tuple(planned), max_seq_len, end, totals["kv"] // max_seq_len, totals["ssm"], totals["conv"])
