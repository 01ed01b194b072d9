"""The rules that decide the format of each weight: one engine for [quantization] and [training].

Rules are read top-down, and the last that matches decides. A linear that no rule matches has the default
format. A weight that belongs to no linear is decided only by a rule that names it, not by a wildcard.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from typing import Literal, Protocol

from n3c.ir.diagnostics import Diagnostic, Severity, Span

from .roles import not_linear, select_layers
from .schema import Spec

Table = Literal["quantization", "training"]


class Weight(Protocol):
    """The properties of a weight that a rule selects by."""

    @property
    def name(self) -> str:
        """Its name in the checkpoint; `experts.*` stands for all routed experts of a layer."""
        ...

    @property
    def role(self) -> str:
        """Its role."""
        ...

    @property
    def layer(self) -> int | None:
        """Its layer; None, or beyond the layers of the trunk, for what is in none of them."""
        ...


@dataclass(frozen=True, slots=True)
class FormatRule:
    """A rule of the spec with its layers resolved."""

    path: str
    """`quantization.rules.2`, or `quantization.format` for the default."""
    format: str
    block_rows: int
    """Rows of an NVFP4 weight block: 16 or 1."""
    roles: tuple[str, ...] = ()
    layers: frozenset[int] | None = None
    """Layers of the trunk; None: all, and what is in no layer."""
    modules: tuple[str, ...] = ()
    span: Span | None = None

    def matches(self, weight: Weight) -> bool:
        """Return whether the rule selects `weight`."""
        if self.modules:
            return any(_names(module, weight) for module in self.modules)
        if self.layers is not None and weight.layer not in self.layers:
            return False
        return _selects(self.roles, weight.role)

    def names(self, weight: Weight) -> bool:
        """Return whether the rule selects `weight` by its module or its very role rather than by a wildcard."""
        return bool(self.modules) or weight.role in self.roles


@cache
def _selects(globs: tuple[str, ...], role: str) -> bool:
    return any(fnmatchcase(role, glob) for glob in globs)


def _names(module: str, weight: Weight) -> bool:
    """Return whether `module` is that of the weight; `….mixer.experts` names all routed experts of a layer."""
    return weight.name.removesuffix(".weight") == module or weight.name.startswith(f"{module}.*.")


@dataclass(frozen=True, slots=True)
class FormatRules:
    """A table of the spec: the default of every linear, and the exceptions."""

    default: FormatRule
    exceptions: tuple[FormatRule, ...] = ()

    def decide(self, weight: Weight, *, is_linear: bool) -> FormatRule | None:
        """Return the rule that decides `weight`; None: nothing does, and it keeps its stored type."""
        found = next((rule for rule in reversed(self.exceptions) if rule.matches(weight)), None)
        if is_linear:
            return found or self.default
        if found is None or not found.names(weight):
            return None
        # The bias of a router has the role of the router: a rule about that role means the linear alone.
        return found if found.modules or weight.role in not_linear() else None

    def faults(self, weights: Iterable[Weight]) -> list[Diagnostic]:
        """Return an E0401 for each rule that matches none of `weights`, all those of the model."""
        weights = tuple(weights)
        return [
            Diagnostic(
                "E0401",
                f"rule `{rule.path}` matches no weight: "
                + (f"modules {list(rule.modules)}" if rule.modules else f"roles {list(rule.roles)}")
                + (" in these layers" if rule.layers is not None else ""),
                rule.span,
                help="remove the rule, or name roles and layers that this model has (`n3c inspect` lists them)",
            )
            for rule in self.exceptions
            if not any(rule.matches(weight) for weight in weights)
        ]

    def warnings(self, weights: Iterable[Weight]) -> list[Diagnostic]:
        """Return a W0402 for each role of a rule that names none of `weights`, all those of the model."""
        roles = {weight.role for weight in weights}
        return [
            Diagnostic(
                "W0402", f"role `{role}` of rule `{rule.path}` names nothing in this model", rule.span, Severity.WARNING
            )
            for rule in self.exceptions
            for role in rule.roles
            if not any(fnmatchcase(known, role) for known in roles)
        ]

    def annotated(self, notes: Mapping[str, str]) -> FormatRules:
        """Return the same rules with `notes` (path of a rule → words) after their paths, as the ledger tells them."""
        rules = (
            replace(rule, path=f"{rule.path} ({notes[rule.path]})") if rule.path in notes else rule
            for rule in self.exceptions
        )
        return replace(self, exceptions=tuple(rules))


def format_rules(spec: Spec, name: Table) -> FormatRules:
    """Return the rules of a table of `spec`; without the table everything stays BF16."""
    table = spec.quantization if name == "quantization" else spec.training
    if table is None:
        return FormatRules(FormatRule(f"no [{name}]", "bf16", 16))
    path = f"{name}.format"
    default = FormatRule(path, table.format, table.block[0], span=spec.span(path))
    exceptions = tuple(
        FormatRule(
            path=f"{name}.rules.{index}",
            format=rule.format,
            block_rows=(rule.block or table.block)[0],
            roles=rule.roles,
            layers=None if rule.layers == "all" else select_layers(rule.layers, spec.model.pattern),
            modules=rule.modules,
            span=spec.span(f"{name}.rules.{index}"),
        )
        for index, rule in enumerate(table.rules)
    )
    return FormatRules(default, exceptions)


@dataclass(frozen=True, slots=True)
class Misfit:
    """A weight that cannot have the format that its rule gives it."""

    weight: Weight
    shape: tuple[int, ...]
    rule: FormatRule
    code: str
    reason: str
    help: str
    span: Span | None


def misfit_diagnostics(misfits: Sequence[Misfit]) -> list[Diagnostic]:
    """Return a diagnostic for all misfits of one rule, role, shape and reason: it names the first, and their number."""
    groups: dict[tuple[object, ...], list[Misfit]] = {}
    for misfit in misfits:
        key = (misfit.rule.path, misfit.weight.role, misfit.shape, misfit.reason)
        groups.setdefault(key, []).append(misfit)
    return [_diagnostic(first, len(others)) for first, *others in groups.values()]


def _diagnostic(misfit: Misfit, others: int) -> Diagnostic:
    more = f" and {others} more of this role and shape" if others else ""
    message = (
        f"`{misfit.weight.name}` {list(misfit.shape)}{more} cannot be {misfit.rule.format}"
        f" by `{misfit.rule.path}`: {misfit.reason}"
    )
    return Diagnostic(misfit.code, message, misfit.span, help=misfit.help)
