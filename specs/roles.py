"""Roles of weights, and the selectors with which rules name weights: role globs and layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cache

from .block_kind import BlockKind
from .blocks import ATTENTION, MAMBA
from .kinds import kinds
from .pattern import Pattern


def _roles(kinds: Iterable[BlockKind]) -> tuple[str, ...]:
    return ("norm", *(role for kind in kinds for role in kind.roles))


def all_roles() -> tuple[str, ...]:
    """Return every role that a rule can name; those of the blocks of MTP under `mtp.`.

    Reports also know roles of vectors (`mamba.ssm`: A_log, D, dt_bias), which have no format but their own.
    """
    return _every_role(kinds())


@cache
def _every_role(known: tuple[BlockKind, ...]) -> tuple[str, ...]:
    in_mtp = _roles(kind for kind in known if kind.in_mtp)
    return ("embedding", "lm_head", *_roles(known), *(f"mtp.{role}" for role in in_mtp), "mtp.eh_proj")


def _shared_prefixes(roles: Sequence[str]) -> Iterator[str]:
    """Yield what several roles begin with, up to a dot or underscore: `moe.`, `moe.latent_`."""
    counts = Counter(role[: end + 1] for role in roles for end, char in enumerate(role) if char in "._")
    return (prefix for prefix, count in counts.items() if count > 1)


def common_globs() -> tuple[str, ...]:
    """Return the globs in which people write roles, wide ones first."""
    return ("mtp.*", *(f"{prefix}*" for kind in kinds() for prefix in _shared_prefixes(kind.roles)))


ROUTERS = frozenset({"moe.router", "mtp.moe.router"})
"""An error in these changes which experts run: no recipe quantizes them, and they train in float32."""


def not_linear() -> frozenset[str]:
    """Return the roles of weights that no linear multiplies with: they have no format but that of the model."""
    return _not_linear(kinds())


@cache
def _not_linear(known: tuple[BlockKind, ...]) -> frozenset[str]:
    vectors = ("norm", *(module.role for kind in known for module in kind.modules if not module.linear))
    return frozenset({"embedding", *vectors, *(f"mtp.{role}" for role in vectors)}) & frozenset(_every_role(known))


def match_roles(globs: Iterable[str]) -> frozenset[str]:
    """Return the roles that any of `globs` matches; `*` and `?` also match dots, case matters."""
    globs = tuple(globs)
    return frozenset(role for role in all_roles() if any(fnmatchcase(role, glob) for glob in globs))


def select_layers(selector: str, pattern: Pattern) -> frozenset[int]:
    """Return the trunk layers that a rule's `layers` names.

    "all"; "3"; "3..9" with both ends; "first N"; "last N"; "before attention": the Mamba layers
    directly in front of an attention layer. Raises ValueError, in words for the user, where the
    selector is malformed or names layers that the pattern does not have.
    """
    total = len(pattern)
    if selector == "all":
        return frozenset(range(total))
    if selector == "before attention":
        pairs = zip(pattern.symbols, pattern.symbols[1:], strict=False)
        return frozenset(index for index, pair in enumerate(pairs) if pair == (MAMBA.symbol, ATTENTION.symbol))
    word, _, number = selector.rpartition(" ")
    if word in ("first", "last") and _is_number(number):
        count = int(number)
        if not 1 <= count <= total:
            raise ValueError(f"`{selector}` of a pattern with {total} layers")
        return frozenset(range(count) if word == "first" else range(total - count, total))
    first, dots, last = selector.partition("..")
    if _is_number(first) and (_is_number(last) if dots else True):
        low, high = int(first), int(last if dots else first)
        if high >= total:
            raise ValueError(f"there is no layer {high}: the pattern has layers 0 to {total - 1}")
        if low > high:
            raise ValueError(f"`{selector}` is empty: {low} comes after {high}")
        return frozenset(range(low, high + 1))
    raise ValueError(
        f'`{selector}` selects no layers: write "all", "3", "3..9", "first N", "last N" or "before attention"'
    )


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10
