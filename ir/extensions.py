"""Extensions: what installed distributions add to n3c by the entry points of three groups.

They are looked for once something is asked for that n3c itself does not have, so that a command which needs none
imports none. `N3C_EXTENSIONS` names the distributions that are considered, separated by commas; it may be empty.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from .diagnostics import Diagnostic, ExitCode, N3CError, Span

Group = Literal["n3c.blocks", "n3c.passes", "n3c.backends"]
GROUPS: tuple[Group, ...] = ("n3c.blocks", "n3c.passes", "n3c.backends")
CHOSEN = "N3C_EXTENSIONS"
"""Environment variable: the names of distributions, separated by commas; every installed one where it is not set."""
_FILE = "entry_points.txt"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry point of an installed distribution."""

    group: Group
    name: str
    reference: str
    """`module:attribute`."""
    distribution: str
    """Name and version."""
    place: Span
    """Its line in the metadata of the distribution."""

    def fault(self, reason: str) -> Diagnostic:
        """Return the error (E0521) for this entry point."""
        help_ = f"repair or uninstall it, or leave it out of {CHOSEN}; `n3c doctor` lists extensions"
        return Diagnostic("E0521", f"extension {self.distribution}, `{self.name}`: {reason}", self.place, help=help_)


@functools.cache
def entries(group: Group) -> tuple[Entry, ...]:
    """Return the entry points of a group, ordered by distribution and name. Nothing is imported."""
    from importlib.metadata import distributions  # takes longer than a check of a spec may

    chosen = os.environ.get(CHOSEN)
    names = None if chosen is None else {_normal(name) for name in chosen.split(",")}
    found: dict[tuple[str, str], Entry] = {}
    for distribution in distributions():
        if names is not None and _normal(distribution.name) not in names:
            continue
        for point in distribution.entry_points:
            if point.group == group:
                title = f"{distribution.name} {distribution.version}"
                place = _place(distribution, point.name)
                # Of two copies of a distribution the first on the path is imported.
                found.setdefault((distribution.name, point.name), Entry(group, point.name, point.value, title, place))
    return tuple(found[key] for key in sorted(found))


def _normal(name: str) -> str:
    """Return a distribution's name as the Python Packaging Authority compares them."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _place(distribution: Any, name: str) -> Span:
    files = (file for file in distribution.files or () if file.name == _FILE)
    path = next((str(file.locate()) for file in files), f"{distribution.name}: {_FILE}")
    for number, line in enumerate((distribution.read_text(_FILE) or "").splitlines(), 1):
        if line.partition("=")[0].strip() == name:
            return Span(path, number, 1, len(line), line)
    return Span(path)


def loaded(entry: Entry, kind: type[T]) -> T:
    """Import what an entry point names, a `kind`; N3CError (E0521, exit code 4) where that fails."""
    added: object = guarded(entry, imported)(entry.reference)
    if not isinstance(added, kind):
        raise N3CError(entry.fault(f"{entry.reference} is not a {kind.__name__}"), ExitCode.TARGET)
    return added


def part(reference: str) -> Callable[..., Any]:
    """Import `module:function`, a part of something that n3c or an extension defines.

    What fails in that of an extension, now or when it is called, is N3CError (E0521, exit code 4).
    """
    entry = owner(reference)
    return imported(reference) if entry is None else guarded(entry, guarded(entry, imported)(reference))


def owner(reference: str) -> Entry | None:
    """Return the entry point of the extension that has a module, or `module:function`; None for n3c's own."""
    package = _package(reference)
    if package == "n3c":
        return None
    return next((entry for group in GROUPS for entry in entries(group) if _package(entry.reference) == package), None)


def _package(reference: str) -> str:
    return reference.partition(":")[0].partition(".")[0]


def imported(reference: str) -> Any:
    """Import `module:attribute`; raises what the import raises."""
    module, _, attribute = reference.partition(":")
    return functools.reduce(getattr, attribute.split("."), importlib.import_module(module))


def guarded(entry: Entry, function: Callable[..., T]) -> Callable[..., T]:
    """Return `function` such that its failures are those of the extension: N3CError (E0521, exit code 4)."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> T:
        try:
            return function(*args, **kwargs)
        except N3CError:
            raise
        except (Exception, SystemExit) as error:  # whatever somebody else's code raises
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            raise N3CError(entry.fault(f"{entry.reference} failed: {what}"), ExitCode.TARGET) from error

    return called
