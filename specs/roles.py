"""Roles of weights, and the selectors with which rules name weights: role globs and layers."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from .pattern import BlockKind, Pattern

_TRUNK = (
    "norm",
    "mamba.in_proj",
    "mamba.conv1d",
    "mamba.out_proj",
    "attention.q_proj",
    "attention.k_proj",
    "attention.v_proj",
    "attention.o_proj",
    "moe.router",
    "moe.latent_down",
    "moe.latent_up",
    "moe.experts.up",
    "moe.experts.down",
    "moe.shared.up",
    "moe.shared.down",
    "mlp.up",
    "mlp.down",
)

ROLES = (
    "embedding",
    "lm_head",
    *_TRUNK,
    *(f"mtp.{role}" for role in _TRUNK if not role.startswith(("mamba.", "mlp."))),
    "mtp.eh_proj",
)
"""Every role that a rule can name. MTP blocks are attention and MoE only, under `mtp.`.

Reports also know `mamba.ssm` (A_log, D, dt_bias), which has no format but its own.
"""

ROUTERS = frozenset({"moe.router", "mtp.moe.router"})
"""An error in these changes which experts run: no recipe quantizes them, and they train in float32."""

NOT_LINEAR = frozenset(role for role in ROLES if role.endswith(("norm", "conv1d"))) | {"embedding"}
"""Roles of weights that no linear multiplies with: they have no format but that of the model."""


def match_roles(globs: Iterable[str]) -> frozenset[str]:
    """Return the roles that any of `globs` matches; `*` and `?` also match dots, case matters."""
    globs = tuple(globs)
    return frozenset(role for role in ROLES if any(fnmatchcase(role, glob) for glob in globs))


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
        mamba, attention = BlockKind.MAMBA.value, BlockKind.ATTENTION.value
        pairs = zip(pattern.symbols, pattern.symbols[1:], strict=False)
        return frozenset(index for index, pair in enumerate(pairs) if pair == (mamba, attention))
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
