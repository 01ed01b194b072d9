"""Writing a spec as TOML: the canonical text, which loads back to an equal spec."""

from __future__ import annotations

import dataclasses
from typing import Any

from .pattern import Pattern
from .reader import entry_class, fields_of, spec_fields
from .schema import Rule, Spec

_LINE = 100
_RULE = ("roles", "modules", "layers", "format", "block")
"""The keys of a rule in reading order."""


def dump_spec(spec: Spec) -> str:
    """Return the canonical TOML text of a resolved spec: every key, defaults included, nothing else.

    `parse_spec(dump_spec(spec), ...)` is equal to `spec`, for every spec that the reader makes.
    """
    lines = [f"schema = {spec.schema}", f"name = {toml_value(spec.name)}"]
    for name in spec_fields():
        table = spec.section(name)
        if not dataclasses.is_dataclass(table) or isinstance(table, type):
            continue
        lines += ["", f"[{name}]", *_pairs(table)]
        for array in _arrays(type(table)):
            for entry in getattr(table, array):
                lines += [f"[[{name}.{array}]]", *_entry(entry)]
    return "\n".join(lines) + "\n"


def _pairs(table: object) -> list[str]:
    arrays = _arrays(type(table))
    pairs = [(name, getattr(table, name)) for name in fields_of(type(table)) if name not in arrays]
    return [f"{name} = {toml_value(value, len(name) + 3)}" for name, value in pairs if value is not None]


def _arrays(table: type) -> list[str]:
    """Return the keys of a table that are arrays of tables."""
    return [name for name, (hint, _, _) in fields_of(table).items() if entry_class(hint) is not None]


def _entry(entry: Any) -> list[str]:
    """Write an entry of an array of tables in reading order, without the keys that say nothing."""
    defaults = {field.name: field.default for field in dataclasses.fields(entry)}
    order = _RULE if isinstance(entry, Rule) else tuple(defaults)
    names = [name for name in order if getattr(entry, name) != defaults[name]]
    return [f"{name} = {toml_value(getattr(entry, name), len(name) + 3)}" for name in names]


def toml_value(value: Any, indent: int = 0) -> str:
    """Return a value as TOML; `indent` is what already stands on its line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"{value:_}" if abs(value) >= 1_000_000 else str(value)
    if isinstance(value, float):
        mantissa, e, exponent = repr(value).partition("e")
        return f"{mantissa}e{int(exponent)}" if e else mantissa
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, Pattern):
        return _pattern(value.compact(), indent)
    entries = [toml_value(entry) for entry in value]
    flat = f"[{', '.join(entries)}]"
    if indent + len(flat) <= _LINE:
        return flat
    return "[\n" + "".join(f"  {entry},\n" for entry in entries) + "]"


def _string(text: str) -> str:
    escaped = (f"\\u{ord(c):04X}" if c < " " or c == "\x7f" else f"\\{c}" if c in '"\\' else c for c in text)
    return f'"{"".join(escaped)}"'


def _pattern(text: str, indent: int) -> str:
    """Write a pattern, over several lines where one would be too long."""
    if indent + len(text) + 2 <= _LINE:
        return f'"{text}"'
    lines = [""]
    for word in text.split(" "):
        if len(lines[-1]) + len(word) >= _LINE:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return '"""\n' + "\n".join(lines) + '\n"""'
