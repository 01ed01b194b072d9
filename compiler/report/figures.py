"""The figures of `n3c inspect`: everything that is told of a spec, as one JSON object."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from n3c.backends.gpus import GPUS, Gpu
from n3c.passes.lower.model import lower
from n3c.passes.serving import serve
from n3c.specs.schema import Spec

from .blocks import blocks_json, blocks_of, places_of
from .cost import count_parameters, decode_bytes, flops_per_token, layer_counts
from .entries import entry_costs
from .memory_fit import memory_fits


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
    places = places_of(lowered, context)
    served = serve(spec, lowered=lowered)
    blocks = blocks_of(places, served, len(spec.model.pattern))
    gpus = tuple(gpus)
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
        "entries": [cost.as_json(gpus) for cost in entry_costs(spec, served, blocks, context, batch)],
        **blocks_json(blocks),
        "fits": [fit.as_json() for fit in memory_fits(spec, served, context, batch, gpus, memory)],
    }
