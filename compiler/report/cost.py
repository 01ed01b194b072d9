"""The costs of a model, from its program: parameters, FLOPs, weight bytes, state bytes, roofline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from n3c.ir.costs import distinct_experts, node_flops
from n3c.ir.program import Call, Parameter, Program
from n3c.passes.serving import Served
from n3c.specs.layer_tables import moe_of_block
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
        active += read_by(1, parameter, spec, size)
    return Parameters(total, active, mtp, dict(sorted(by_role.items())))


def read_by(tokens: int, parameter: Parameter, spec: Spec, size: int) -> int:
    """Return how much of `size` tokens read: of routed experts those that they meet, by expectation."""
    routed = parameter.role.removeprefix("mtp.").startswith("moe.experts.")
    moe = moe_of_block(spec, parameter.layer) if routed else None
    if moe is None:
        return size
    return round(size * distinct_experts(moe.num_experts, moe.top_k, tokens) / moe.num_experts)


def flops_per_token(program: Program, context: int, *, mtp: bool = False) -> int:
    """FLOPs of one token's forward pass, attending to `context` tokens; a multiply-add is two.

    `mtp` adds the blocks of every prediction depth.
    """
    return sum(
        call_flops(program, call, context) for call in program.entry_points["forward"].calls if mtp or not _is_mtp(call)
    )


def _is_mtp(call: Call) -> bool:
    return any(name.startswith("mtp") for name in call.outputs)


def call_flops(program: Program, call: Call, context: int) -> int:
    """Return the FLOPs of one token in one call."""
    return sum(node_flops(node, context) for node in program.functions[call.function].nodes)


def decode_bytes(served: Served, spec: Spec, batch: int, context: int) -> dict[str, int]:
    """Bytes that one decode step must move: weights it reads, states it reads and writes, cache it reads.

    Routed experts count as the different ones that the sequences choose, by expectation.
    """
    weights = embedding = 0
    program = served.program
    for name in {name: None for call in program.entry_points["decode"].calls for name in call.parameters}:
        parameter = program.parameters[name]
        size = read_by(batch, parameter, spec, parameter.type.bytes)
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
