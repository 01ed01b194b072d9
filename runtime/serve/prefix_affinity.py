"""Which replica a request goes to: the one that is likeliest to have read its beginning before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, cast

BEGINNING = 512
"""Characters of a prompt that decide."""


def beginning(body: bytes) -> str:
    """Return the beginning of the prompt of a request, of a chat the first messages; empty where there is none."""
    try:
        data = json.loads(body)
    except ValueError:
        return ""
    table = cast("dict[str, Any]", data) if isinstance(data, dict) else {}
    if isinstance(table.get("messages"), list):
        # the first user's message tells conversations apart, whose system messages are often the same
        return json.dumps(cast("list[Any]", table["messages"])[:2])[:BEGINNING]
    return json.dumps(table.get("prompt", ""))[:BEGINNING]


def ranked(text: str, replicas: Sequence[str]) -> list[str]:
    """Return replicas, the one first that requests of this beginning go to, then those that take its place.

    By rendezvous hashing (Thaler and Ravishankar, 1998): where a replica comes or goes, only its own requests move.
    """

    def weight(replica: str) -> bytes:
        return hashlib.blake2b(f"{replica}\n{text}".encode(errors="replace"), digest_size=8).digest()

    return sorted(replicas, key=weight, reverse=True)
