"""The fit of a model on GPUs: weights and states of requests against their memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from n3c.passes.serving import Served
from n3c.specs.schema import Spec

GB = 10**9
CARDS = {
    24: "RTX 4090",
    32: "RTX 5090",
    48: "RTX 6000 Ada, L40S",
    80: "A100, H100",
    96: "RTX PRO 6000",
    141: "H200",
    180: "B200",
}
"""Memory in GB → cards that have it."""
RESERVED_GB = 3
"""Of each card, for the driver, plans and their scratch memory (1.6 GB for a prefill chunk of Super)."""


@dataclass(frozen=True, slots=True)
class MemoryFit:
    """How a model fits a card of one size. A request holds its states, and caches of the context."""

    gb: int
    cards: str
    fits: bool
    """Whether the requests fit at the context that was asked for, on one card."""
    longest_context: int
    """Tokens that each of the requests may have, at most what the model is made for; 0 where weights do not fit."""
    most_requests: int | None
    """Requests that fit at the context; None: as many as you like, of a model without states."""
    gpus: int
    """Cards that hold weights and the requests at the context together, cut into stages."""

    def as_json(self) -> dict[str, Any]:
        """Return one entry of `inspect --json`, key `fits`."""
        return {
            "gpu_gb": self.gb,
            "cards": self.cards,
            "fits": self.fits,
            "longest_context": self.longest_context,
            "most_requests": self.most_requests,
            "gpus": self.gpus,
        }


def memory_fits(spec: Spec, served: Served, context: int, batch: int) -> tuple[MemoryFit, ...]:
    """Return how a model fits each size of card, with `batch` requests of `context` tokens."""
    plan = served.plan
    weights = sum(entry.bytes for entry in served.program.ledger)
    fixed = plan.bytes_per_request + plan.pending_bytes
    a_token = plan.kv_bytes_per_token + plan.mtp_kv_bytes_per_token
    request = plan.bytes_at(context)
    found: list[MemoryFit] = []
    for gb, cards in CARDS.items():
        usable = (gb - RESERVED_GB) * GB
        free = usable - weights
        caches = free // batch - fixed
        longest = 0
        if caches >= 0:
            most = spec.model.max_position_embeddings
            longest = most if a_token == 0 else min(most, caches // a_token)
        needed = weights + batch * request
        most_requests = max(0, free // request) if request else None if free >= 0 else 0
        found.append(MemoryFit(gb, cards, needed <= usable, longest, most_requests, -(-needed // usable)))
    return tuple(found)
