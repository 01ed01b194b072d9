"""docs/spec.md, made from the schema, so that the reference cannot fall behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

from n3c.specs.blocks import KINDS
from n3c.specs.pattern import Pattern
from n3c.specs.reader import entry_class, fields_of, plain, spec_fields
from n3c.specs.roles import all_roles
from n3c.specs.schema import Spec


def _tables() -> Iterator[tuple[str, type]]:
    yield "", Spec
    for name, (hint, _, _) in spec_fields().items():
        if dataclasses.is_dataclass(plain(hint)):
            yield f"[{name}]", plain(hint)
        for key, (entries, _, _) in fields_of(plain(hint)).items() if dataclasses.is_dataclass(plain(hint)) else ():
            entry = entry_class(entries)
            if entry is not None and name != "training":  # its rules are those of [quantization]
                yield f"[[{name}.{key}]]", entry


TABLES = tuple(_tables())

SYMBOLS = ", ".join(f"`{kind.symbol}` {kind.title}" for kind in KINDS)

HEAD = f"""# Spec reference

Made from `specs/schema.py` and `specs/blocks.py` by `make golden`. A key without a default is required; a table
is required where a pattern uses it. `n3c schema` prints the same as JSON Schema, for editors.

## Patterns

One symbol a residual block: {SYMBOLS}. `(ME)4` repeats a group and `M3` a symbol;
groups nest; white space and `#` comments are free; `|` is a pipeline cut, kept for Megatron.

## Layers that differ

`[[moe.layers]]` gives MoE blocks of a compressed model (Puzzle, Bolt) sizes of their own: `layers` selects blocks of
the pattern, or with `"mtp"` those of multi-token prediction. Entries are read top-down, and of several that select a
block and give a key the last one decides. What no entry gives is that of `[moe]`.

```toml
[[moe.layers]]
layers = "1..5"
top_k = 4
intermediate_size = 1280
```

## Rules

Rules are read top-down and the last one that matches a weight decides. `roles` are globs over

"""


def reference() -> str:
    """Return the text of docs/spec.md."""
    names = ", ".join(f"`{role}`" for role in all_roles())
    return HEAD + names + ".\n" + "".join(_table(title, cls) for title, cls in TABLES)


def _table(title: str, cls: type) -> str:
    hints = get_type_hints(cls)
    rows: list[str] = []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if "doc" in field.metadata and plain(hint) not in dict(TABLES).values():
            cells = (f"`{field.name}`", _type(hint, field.metadata), _default(field), field.metadata["doc"])
            rows.append(f"| {' | '.join(cells)} |\n")
    heading = f"## `{title}`" if title else "## Top level"
    return f"\n{heading}\n\n| key | type | default | |\n|---|---|---|---|\n" + "".join(rows)


def _type(hint: Any, metadata: Any) -> str:
    hint = plain(hint)
    if metadata.get("choices"):
        return " or ".join(f"`{list(choice)}`" for choice in metadata["choices"])
    if get_origin(hint) is Literal:
        return ", ".join(f"`{arg}`" for arg in get_args(hint))
    if get_origin(hint) is tuple:
        entry = get_args(hint)[0]
        return "array of tables" if dataclasses.is_dataclass(entry) else f"array of {_name(entry)}"
    return _name(hint)


def _name(hint: type) -> str:
    names: dict[type, str] = {int: "integer", float: "number", bool: "boolean", str: "string", Pattern: "pattern"}
    return names[hint]


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "required"
    if field.default is None:
        return "none"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"
