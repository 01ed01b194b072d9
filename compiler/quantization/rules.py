"""From formats of modules to the [quantization] table of a spec, in rules that a person can read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

from n3c.compiler.quantization.search.units import unit_name
from n3c.specs.modelopt import rules_table
from n3c.specs.modules import Group, module_groups
from n3c.specs.schema import Format, Quantization, Rule, Spec

_FORMATS: tuple[Format, ...] = get_args(Format)


def groups_of(spec: Spec) -> list[Group]:
    """Return the modules of a spec's model by role and layer."""
    mtp = None if spec.mtp is None else spec.mtp.pattern
    return module_groups(spec.model.pattern, mtp, spec.moe, spec.model.tie_word_embeddings)


def spec_with_formats(spec: Spec, formats: Mapping[str, str], block: tuple[int, int]) -> Spec:
    """Return `spec` with rules that give every unit of `formats` its format, and BF16 to all other linears."""

    def format_of(group: Group, module: str) -> str:
        if group.experts:
            module = group.name.replace("{}", "*")
        return formats.get(unit_name(module), "bf16")

    return spec_with_table(spec, rules_table(groups_of(spec), format_of, spec.model.pattern), block)


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
    default = next(name for name in _FORMATS if name == table["format"])
    rows, columns = block or table["block"]
    # The places of the old rules say nothing of the new ones.
    spans = {path: span for path, span in spec.spans.items() if path.partition(".")[0] != "quantization"}
    return replace(spec, quantization=Quantization(default, (rows, columns), rules), spans=spans)
