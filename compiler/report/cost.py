"""The costs of a model, from its program: parameters, FLOPs, weight bytes, state bytes, roofline."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from n3c.backends.gpus import GPUS, Gpu
from n3c.ir.costs import distinct_experts, node_flops
from n3c.ir.program import Call, Program
from n3c.passes.lower.model import lower
from n3c.passes.serving import Served, serve
from n3c.specs.schema import Spec

from .memory_fit import memory_fits


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
    """
    return sum(
        node_flops(node, context)
        for call in program.entry_points["forward"].calls
        if mtp or not _is_mtp(call)
        for node in program.functions[call.function].nodes
    )


def _is_mtp(call: Call) -> bool:
    return any(name.startswith("mtp") for name in call.outputs)


def decode_bytes(served: Served, spec: Spec, batch: int, context: int) -> dict[str, int]:
    """Bytes that one decode step must move: weights it reads, states it reads and writes, cache it reads.

    Routed experts count as the different ones that the sequences choose, by expectation.
    """
    weights = embedding = 0
    program = served.program
    for name in {name: None for call in program.entry_points["decode"].calls for name in call.parameters}:
        parameter = program.parameters[name]
        size = parameter.type.bytes
        if parameter.role.startswith("moe.experts.") and spec.moe is not None:
            met = distinct_experts(spec.moe.num_experts, spec.moe.top_k, batch)
            size = round(size * met / spec.moe.num_experts)
        if parameter.role == "embedding" and not spec.model.tie_word_embeddings:
            embedding += batch * spec.model.hidden_size * size // parameter.type.elements
            continue
        weights += size
    states = 2 * served.plan.bytes_per_request * batch
    cache = served.plan.kv_bytes_per_token * (context + 1) * batch
    total = weights + embedding + states + cache
    return {"weights": weights + embedding, "states": states, "kv_cache": cache, "total": total}


def inspect_spec(
    spec: Spec,
    *,
    context: int | None = None,
    batch: int = 1,
    gpus: Iterable[Gpu] = GPUS.values(),
    memory: int | None = None,
) -> dict[str, Any]:
    """Return the figures of `n3c inspect SPEC --json`; N3CError where the spec's rules do not fit.

    What fits is told for `gpus`, or for one of `memory` bytes.
    """
    context = spec.serving.max_seq_len if context is None else context
    lowered = lower(spec)
    counts, flops = count_parameters(lowered, spec), flops_per_token(lowered, context)
    served = serve(spec, lowered=lowered)
    by_format: dict[str, int] = {}
    for entry in served.program.ledger:
        by_format[entry.format] = by_format.get(entry.format, 0) + entry.bytes
    moved, plan = decode_bytes(served, spec, batch, context), served.plan
    return {
        "name": spec.name,
        "layers": {
            "total": len(spec.model.pattern),
            **{kind.table: spec.model.pattern.symbols.count(kind.symbol) for kind in dict.fromkeys(spec.model.pattern)},
        },
        "parameters": counts.as_json(),
        "flops_per_token": flops,
        "weights": {"bytes": sum(by_format.values()), "by_format": dict(sorted(by_format.items()))},
        "state": {
            "kv_bytes_per_token": plan.kv_bytes_per_token,
            "bytes_per_request": plan.bytes_per_request,
            "ssm_bytes_per_request": plan.ssm_bytes,
            "conv_bytes_per_request": plan.conv_bytes,
            "mtp_kv_bytes_per_token": plan.mtp_kv_bytes_per_token,
            "snapshots": plan.snapshots(),
        },
        "decode": {
            "context": context,
            "batch": batch,
            "bytes": moved,
            "flops": flops * batch,
            "flops_per_byte": round(flops * batch / moved["total"], 2),
            "memory_bytes": sum(by_format.values()) + batch * plan.bytes_at(context),
            "tokens_per_second_at_1_TB_per_s": round(batch * 1e12 / moved["total"], 1),
        },
        "fits": [fit.as_json() for fit in memory_fits(spec, served, context, batch, gpus, memory)],
    }
