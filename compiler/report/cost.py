"""The costs of a model, from its program: parameters, FLOPs, weight bytes, state bytes, roofline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from n3c.ir import ops
from n3c.ir.program import Call, Program
from n3c.passes.serving import Served
from n3c.specs.schema import Spec


@dataclass(frozen=True, slots=True)
class Parameters:
    """Counts. Total and active leave out the MTP block and buffers, as the published figures do."""

    total: int
    active: int
    """Parameters that one token uses: embedding and head once each, and top_k of the routed experts."""
    mtp: int
    by_role: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        """Return the form of `inspect --json`, key `parameters`."""
        return {"total": self.total, "active": self.active, "mtp": self.mtp, "by_role": self.by_role}


def count_parameters(program: Program, spec: Spec) -> Parameters:
    """Count the parameters of a lowered program (before quantization)."""
    total = active = mtp = 0
    by_role: dict[str, int] = {}
    for parameter in program.parameters.values():
        if parameter.buffer:
            continue
        size = parameter.type.elements
        by_role[parameter.role] = by_role.get(parameter.role, 0) + size
        if parameter.role.startswith("mtp."):
            mtp += size
            continue
        total += size
        routed = parameter.role.startswith("moe.experts.") and spec.moe is not None
        active += size * spec.moe.top_k // spec.moe.num_experts if routed and spec.moe else size
    return Parameters(total, active, mtp, dict(sorted(by_role.items())))


def flops_per_token(program: Program, context: int, *, mtp: bool = False) -> int:
    """FLOPs of one token's forward pass, attending to `context` tokens; a multiply-add is two.

    `mtp` adds the blocks of every prediction depth.
    Counted are linears, convolutions, the SSD recurrence and attention (4 · context · Hq · P a layer).
    """
    return sum(
        call_flops(program, call, context) for call in program.entry_points["forward"].calls if mtp or not _is_mtp(call)
    )


def _is_mtp(call: Call) -> bool:
    return any(name.startswith("mtp") for name in call.outputs)


def call_flops(program: Program, call: Call, context: int) -> int:
    """Return the FLOPs of one token in one call."""
    total = 0
    for node in program.functions[call.function].nodes:
        if node.op.flops is not None:
            operands = {name: v.type if v else None for name, v in node.named_operands.items()}
            total += node.op.flops(operands, tuple(r.type for r in node.results), node.attributes)
        elif node.op is ops.attention:
            width = node["q"].type.dims[-1]
            total += 4 * context * width if isinstance(width, int) else 0
    return total


def decode_bytes(served: Served, spec: Spec, batch: int, context: int) -> dict[str, int]:
    """Bytes that one decode step must move: weights it reads, states it reads and writes, cache it reads.

    Routed experts count as top_k a sequence, but never more than all of them.
    """
    weights = embedding = 0
    program = served.program
    for name in {name: None for call in program.entry_points["decode"].calls for name in call.parameters}:
        parameter = program.parameters[name]
        size = parameter.type.bytes
        if parameter.role.startswith("moe.experts.") and spec.moe is not None:
            size = size * min(spec.moe.num_experts, batch * spec.moe.top_k) // spec.moe.num_experts
        if parameter.role == "embedding" and not spec.model.tie_word_embeddings:
            embedding += batch * spec.model.hidden_size * size // parameter.type.elements
            continue
        weights += size
    states = 2 * served.plan.bytes_per_request * batch
    cache = served.plan.kv_bytes_per_token * (context + 1) * batch
    total = weights + embedding + states + cache
    return {"weights": weights + embedding, "states": states, "kv_cache": cache, "total": total}


def layer_counts(spec: Spec) -> dict[str, int]:
    """Return the form of `inspect --json`, key `layers`: how many there are, in all and by table."""
    pattern = spec.model.pattern
    return {"total": len(pattern), **{kind.table: count for kind, count in pattern.counts().items()}}
