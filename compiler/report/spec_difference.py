"""Two specs compared, key by key; rules as a sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import zip_longest
from typing import Any

from n3c.specs.dump import toml_value
from n3c.specs.reader import fields_of, spec_fields
from n3c.specs.schema import Rule, Spec


@dataclass(frozen=True, slots=True)
class Change:
    """A value that two sides have differently; None where one of them lacks it."""

    key: str
    a: str | None
    b: str | None

    def as_json(self) -> dict[str, Any]:
        """Return one entry of `diff --json`, key `spec`."""
        return {"key": self.key, "a": self.a, "b": self.b}


def compare_specs(a: Spec, b: Spec) -> tuple[Change, ...]:
    """Return the keys whose values differ, defaults included, as TOML."""
    values_a, values_b = dict(_values(a)), dict(_values(b))
    keys = dict.fromkeys((*values_a, *values_b))
    changes = [Change(key, values_a.get(key), values_b.get(key)) for key in keys]
    return tuple(change for change in changes if change.a != change.b) + tuple(_rules(a, b))


def _values(table: object, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield dotted key and TOML of every value but rules."""
    for name in spec_fields() if isinstance(table, Spec) else fields_of(type(table)):
        value = table.section(name) if isinstance(table, Spec) else getattr(table, name)
        key = f"{path}.{name}".removeprefix(".")
        if value is None or name == "rules":
            continue
        if dataclasses.is_dataclass(value) and name in spec_fields():
            yield from _values(value, key)
        else:
            yield key, toml_value(value)


def _rules(a: Spec, b: Spec) -> Iterator[Change]:
    for table in ("quantization", "training"):
        rules_a, rules_b = ([_rule(rule) for rule in getattr(getattr(s, table), "rules", ())] for s in (a, b))
        for tag, a1, a2, b1, b2 in SequenceMatcher(None, rules_a, rules_b, autojunk=False).get_opcodes():
            if tag != "equal":
                for before, after in zip_longest(rules_a[a1:a2], rules_b[b1:b2]):
                    yield Change(f"{table}.rules", before, after)


def _rule(rule: Rule) -> str:
    names = (name for name in fields_of(Rule) if getattr(rule, name) not in (None, (), "all"))
    return ", ".join(f"{name} = {toml_value(getattr(rule, name))}" for name in names)
