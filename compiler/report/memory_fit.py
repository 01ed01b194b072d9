"""The fit of a model on GPUs: weights and states of requests against their memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from n3c.backends.gpus import Gpu
from n3c.backends.trt.targets import Flavour, serving
from n3c.passes.serving import Served
from n3c.runtime.options import size_of, usage_error
from n3c.specs.schema import Spec

RESERVED = 3 * 10**9
"""Bytes of each GPU, for the driver, plans and their scratch memory (1.6 GB for a prefill chunk of Super)."""


@dataclass(frozen=True, slots=True)
class MemoryFit:
    """How a model fits a GPU. A request holds its states, and caches of the context."""

    gpu: str
    memory_bytes: int
    trt: tuple[Flavour, ...]
    """Which TensorRT serves it; nothing for one that is given by its memory."""
    fits: bool
    """Whether the requests fit at the context that was asked for, on one GPU."""
    longest_context: int
    """Tokens that each of the requests may have, at most what the model is made for; 0 where weights do not fit."""
    most_requests: int | None
    """Requests that fit at the context; None: as many as you like, of a model without states."""
    gpus: int
    """GPUs that hold weights and the requests at the context together, cut into stages."""

    def as_json(self) -> dict[str, Any]:
        """Return one entry of `inspect --json`, key `fits`."""
        return asdict(self) | {"trt": list(self.trt)}


def memory_of(given: int | str | None) -> int | None:
    """Return the bytes of `--memory`, None without it; N3CError (exit code 2) unless they are more than `RESERVED`."""
    if given is None:
        return None
    size = size_of("--memory", given)
    if size <= RESERVED:
        raise usage_error(f"--memory: {given} is not more than the {RESERVED // 10**9} GB that are kept free")
    return size


def memory_fits(
    spec: Spec, served: Served, context: int, batch: int, gpus: Iterable[Gpu], memory: int | None = None
) -> tuple[MemoryFit, ...]:
    """Return how a model fits each of `gpus`, or one of `memory` bytes, with `batch` requests of `context` tokens."""
    plan = served.plan
    weights = sum(entry.bytes for entry in served.program.ledger)
    fixed = plan.bytes_per_request + plan.pending_bytes
    a_token = plan.kv_bytes_per_token + plan.mtp_kv_bytes_per_token
    request = plan.bytes_at(context)
    needed = weights + batch * request
    asked = [(gpu.name, gpu.memory, serving(gpu)) for gpu in gpus] if memory is None else [("other", memory, ())]
    found: list[MemoryFit] = []
    for name, size, trt in asked:
        usable = size - RESERVED
        free = usable - weights
        caches = free // batch - fixed
        longest = 0
        if caches >= 0:
            most = spec.model.max_position_embeddings
            longest = most if a_token == 0 else min(most, caches // a_token)
        most_requests = max(0, free // request) if request else None if free >= 0 else 0
        found.append(MemoryFit(name, size, trt, needed <= usable, longest, most_requests, -(-needed // usable)))
    return tuple(found)
