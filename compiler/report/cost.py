"""The costs of a model, from its program: parameters, FLOPs, weight bytes, state bytes, roofline."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from n3c.backends.gpus import GPUS, Gpu
from n3c.ir import ops
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
    Counted are linears, convolutions, the SSD recurrence and attention (4 · context · Hq · P a layer).
    """
    return sum(
        _call_flops(program, call, context)
        for call in program.entry_points["forward"].calls
        if mtp or not _is_mtp(call)
    )


def _is_mtp(call: Call) -> bool:
    return any(name.startswith("mtp") for name in call.outputs)


def _call_flops(program: Program, call: Call, context: int) -> int:
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
        "layers": layer_counts(spec),
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
