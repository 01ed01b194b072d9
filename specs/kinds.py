"""The block kinds that are known: those of n3c and, once something asks for another, those of extensions.

`KINDS` of `blocks` is what n3c itself has. A symbol, a table or a role that none of these has makes `know_more`
load what is installed under the entry points `n3c.blocks`; from then on `kinds()` has all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError
from n3c.ir.extensions import Entry, entries, loaded

from .block_kind import BlockKind
from .blocks import KINDS

_RESERVED = frozenset("()|#/") | frozenset("0123456789")
"""What has another meaning in patterns."""
_TABLES = ("schema", "name", "model", "norm", "embedding", "lm_head", "mtp", "quantization", "training", "serving")
"""What no block kind can be called: other tables of a spec, and roles."""


class _Known:
    """The kinds so far."""

    kinds: tuple[BlockKind, ...] = KINDS


def kinds() -> tuple[BlockKind, ...]:
    """Return every block kind that is known, in the order in which specs, reports and generated code have them."""
    return _Known.kinds


def by_symbol() -> dict[str, BlockKind]:
    """Return the kinds that are known: symbol → kind."""
    return _by_symbol(kinds())


@cache
def _by_symbol(known: tuple[BlockKind, ...]) -> dict[str, BlockKind]:
    return {kind.symbol: kind for kind in known}


def kind_of(symbol: str) -> BlockKind | None:
    """Return the kind of a symbol, that of an extension if need be; None where there is none."""
    if symbol not in by_symbol():
        know_more()
    return by_symbol().get(symbol)


@cache
def know_more() -> tuple[Diagnostic, ...]:
    """Load the block kinds of installed extensions, once, and return the errors (E0521).

    There is one for each that cannot be loaded, or has a name that another kind has; then none is taken.
    """
    found, origins, faults = list(KINDS), dict[BlockKind, Entry](), list[Diagnostic]()
    for entry in entries("n3c.blocks"):
        try:
            kind = loaded(entry, BlockKind)
        except N3CError as error:
            faults += error.diagnostics
            continue
        reason = _clash(kind, found, origins)
        if reason is not None:
            faults.append(entry.fault(reason))
        found.append(kind)
        origins[kind] = entry
    if not faults:
        _Known.kinds = tuple(found)
    return tuple(faults)


def require_all() -> None:
    """Load the block kinds of installed extensions; N3CError (E0521, exit code 4) where one is not sound."""
    faults = know_more()
    if faults:
        raise N3CError(faults, ExitCode.TARGET)


def who_adds() -> str:
    """Return what a message about an unknown symbol or table says of extensions."""
    names = ", ".join(dict.fromkeys(entry.distribution for entry in entries("n3c.blocks")))
    return f"installed extensions add others: {names}" if names else "extensions may add others, and none is installed"


def _clash(kind: BlockKind, others: Sequence[BlockKind], origins: dict[BlockKind, Entry]) -> str | None:
    """Return why a kind cannot stand beside others, or None where it can."""
    if len(kind.symbol) != 1 or not kind.symbol.isascii() or not kind.symbol.isprintable():
        return f"the symbol {kind.symbol!r} is not one printable ASCII character"
    if kind.symbol.isspace() or kind.symbol in _RESERVED:
        return f"the symbol `{kind.symbol}` has another meaning in patterns"
    for name in (kind.name, kind.table, kind.class_name):
        if not name.isidentifier() or name in _TABLES:
            return f"`{name}` cannot be the name of a block kind"
    for other in others:
        taken = sorted(_names(kind) & _names(other))
        if taken:
            whose = origins[other].distribution if other in origins else "n3c"
            return f"{taken[0]} is taken by {other.title} of {whose}"
    return None


def _names(kind: BlockKind) -> set[str]:
    """Return the names that no two kinds may share, each with what it is."""
    named: Iterable[tuple[str, Iterable[str]]] = (
        ("symbol", [kind.symbol]),
        ("function", [kind.name]),
        ("table", [kind.table]),
        ("class", [kind.class_name]),
        ("role", kind.roles),
        ("block type", kind.hf_names),
        ("config key", [name for key in kind.config_keys for name in (key.name, *key.aliases)]),
    )
    return {f"the {what} `{name}`" for what, names in named for name in names}
