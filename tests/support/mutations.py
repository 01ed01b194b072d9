"""Damaged files: what a disk, an editor or an attacker makes of a good one; the same for the same seed."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 1 << 70, 10**400, 1e308, float("inf"), float("nan"), "", "\0", "\ud800", "../../etc/passwd",
    "x" * 300, [], {}, [[]], {"dtype": []}, [1, 2, 3], "\x1b[2J",
)  # fmt: skip
"""Values that are of another type, of no size, or not what they seem."""


def damaged(good: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Yield `count` texts with bytes cut, changed, doubled or put in."""
    rng = random.Random(seed)
    yield b""
    yield good + b"\0"
    yield good[: len(good) // 2]
    for _ in range(count - 3):
        start = rng.randrange(len(good))
        end = min(len(good), start + rng.choice((1, 1, 4, 30)))
        piece = rng.choice((b"", bytes([rng.randrange(256)]), good[start:end] * 2, b'"', b"{", b"\xff", b"9" * 30))
        yield good[:start] + piece + good[end:]


def altered(good: object, count: int, seed: int) -> Iterator[bytes]:
    """Yield `count` JSON texts with a value replaced by a hostile one, removed, or under another key."""
    rng = random.Random(seed)
    for _ in range(count):
        data = copy.deepcopy(good)
        places = list(_places(data))
        holder, key = rng.choice(places)
        value, way = rng.choice(HOSTILE), rng.randrange(8)
        if way == 0:
            del holder[key]
        elif way == 1 and isinstance(holder, dict):
            holder[str(value)[:300]] = holder.pop(key)
        else:
            holder[key] = value
        yield json.dumps(data).encode()
    yield b"[" * 100_000
    yield json.dumps({"a": good})[:-1].encode() + b', "a": 1}'


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each value below `data` as its holder and its key."""
    for key in data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():
        yield data, key
        yield from _places(data[key])
