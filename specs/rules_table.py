"""From the format of each module to a [quantization] table, in few rules that a person can read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, get_args

from n3c.ir.formats import FORMATS

from .modules import Group
from .pattern import Pattern
from .roles import common_globs, select_layers
from .schema import Format, Quantization, Rule, Spec


def rules_table(groups: Sequence[Group], format_of: Callable[[Group, str], str], pattern: Pattern) -> dict[str, Any]:
    """Return the [quantization] table, as plain values, that gives every module the format that `format_of` returns.

    Its rules are few: of roles, of roles in a stretch of layers, and of modules for what is left.
    """
    roles: dict[str, Counter[str]] = {}
    by_group: list[tuple[Group, Counter[str]]] = []
    total: Counter[str] = Counter()
    for group in groups:
        counts = Counter(format_of(group, module) for module in group.modules)
        by_group.append((group, counts))
        roles.setdefault(group.role, Counter()).update(counts)
        total.update(counts)
    del total["bf16"]
    default = max(total, key=lambda name: total[name], default="bf16")
    usual = {role: max(counts, key=lambda name: counts[name]) for role, counts in roles.items()}
    rules = [
        {"roles": role_globs([role for role in usual if usual[role] == chosen], list(usual)), "format": chosen}
        for chosen in FORMATS
        if chosen != default and chosen in usual.values()
    ]
    rules += _exceptions(by_group, usual, format_of, pattern)
    return {"format": default, "block": [1, 16], "rules": rules}


def _exceptions(
    groups: Sequence[tuple[Group, Counter[str]]],
    usual: Mapping[str, str],
    format_of: Callable[[Group, str], str],
    pattern: Pattern,
) -> list[dict[str, Any]]:
    """Return rules for what differs from the usual format of its role."""
    layers: dict[tuple[str, str], list[int]] = {}  # (role, format) → layers that have it as a whole
    modules: dict[str, list[str]] = {}
    for group, counts in groups:
        other = next(iter(counts))
        if len(counts) == 1 and other != usual[group.role] and group.layer is not None:
            layers.setdefault((group.role, other), []).append(group.layer)
            continue
        for module in group.modules:
            chosen = format_of(group, module) if counts.keys() != {usual[group.role]} else usual[group.role]
            if chosen != usual[group.role]:
                modules.setdefault(chosen, []).append(module)
    selected: dict[tuple[str, str], list[str]] = {}  # (selector, format) → roles
    names = {(group.role, group.layer): group.name for group, _ in groups}
    experts = {group.role: group.experts for group, _ in groups}
    for (role, chosen), wanted in layers.items():
        having = [group.layer for group, _ in groups if group.role == role and group.layer is not None]
        selector = _selector(wanted, having, pattern)
        if selector is not None:
            selected.setdefault((selector, chosen), []).append(role)
        elif experts[role] == 0:
            modules.setdefault(chosen, []).extend(names[role, layer] for layer in wanted)
        else:  # hundreds of experts a layer: a rule for each layer is shorter
            for layer in wanted:
                selected.setdefault((str(layer), chosen), []).append(role)
    present = list(usual)
    rules: list[dict[str, Any]] = [
        {"roles": role_globs(found, present), "layers": selector, "format": chosen}
        for (selector, chosen), found in selected.items()
    ]
    return rules + [{"modules": found, "format": chosen} for chosen, found in modules.items()]


def _selector(wanted: Sequence[int], having: Sequence[int], pattern: Pattern) -> str | None:
    """Return the `layers` selector that picks `wanted` of the layers `having` a role, if there is one."""
    total, low, high = len(pattern), min(wanted), max(wanted)
    span = str(low) if low == high else f"{low}..{high}"
    for selector in ("before attention", f"last {total - low}", f"first {high + 1}", span):
        if select_layers(selector, pattern).intersection(having) == frozenset(wanted):
            return selector
    return None


def role_globs(roles: Sequence[str], present: Sequence[str]) -> list[str]:
    """Shorten a list of roles by globs that match, of the roles `present` in a model, no others."""
    left = list(roles)
    for glob in common_globs():
        matched = [role for role in present if fnmatchcase(role, glob)]
        if len(matched) > 1 and set(matched) <= set(left):
            place = left.index(matched[0])
            left = (
                [role for role in left[:place] if role not in matched]
                + [glob]
                + [role for role in left[place:] if role not in matched]
            )
    return left


def spec_with_table(spec: Spec, table: Mapping[str, Any], block: tuple[int, int] | None = None) -> Spec:
    """Return `spec` with another [quantization] table, given as plain values; `block` outranks the table's."""
    rules = tuple(
        Rule(
            format=rule["format"],
            roles=tuple(rule.get("roles", ())),
            layers=rule.get("layers", "all"),
            modules=tuple(rule.get("modules", ())),
        )
        for rule in table["rules"]
    )
    formats: tuple[Format, ...] = get_args(Format)
    default = next(name for name in formats if name == table["format"])
    rows, columns = block or table["block"]
    return spec_with_quantization(spec, Quantization(default, (rows, columns), rules))


def spec_with_quantization(spec: Spec, table: Quantization) -> Spec:
    """Return `spec` with another [quantization]."""
    # The places of the old rules say nothing of the new ones.
    spans = {path: span for path, span in spec.spans.items() if path.partition(".")[0] != "quantization"}
    return replace(spec, quantization=table, spans=spans)
