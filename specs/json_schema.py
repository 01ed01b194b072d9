"""The JSON Schema of a spec, from the same dataclasses: for editors (Taplo, Even Better TOML) and other tools.

It states what one key may be. What keys say of each other (`top_k` and `num_experts`) only the
loader knows, and patterns and role globs are plain strings here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, cast, get_args, get_origin

from .pattern import Pattern
from .reader import MAX_ENTRIES, entry_class, fields_of, plain, spec_fields
from .schema import Format, Quantization, Rule, Spec, Training, TrainingFormat


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a spec file, with the tables of all block kinds that are known."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "n3c architecture spec",
        **_table(Spec),
    }


def _table(cls: type, formats: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the schema of one table; `formats` are those that its rules may give."""
    if cls in (Quantization, Training):
        formats = get_args(Format if cls is Quantization else TrainingFormat)
    properties: dict[str, Any] = {}
    required: list[str] = []
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    for name, (hint, metadata, is_required) in (spec_fields() if cls is Spec else fields_of(cls)).items():
        described = {"description": metadata["doc"], **_value(plain(hint), metadata, formats)}
        if cls is Rule and name == "format":
            described["enum"] = list(formats)
        if is_required:
            required.append(name)
        elif defaults.get(name) is not None and not dataclasses.is_dataclass(defaults[name]):
            default = defaults[name]
            described["default"] = list(cast("tuple[object, ...]", default)) if isinstance(default, tuple) else default
        properties[name] = described
    schema: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    if required:
        schema["required"] = required
    if cls is Rule:
        schema["oneOf"] = [{"required": ["roles"]}, {"required": ["modules"]}]
    return schema


def _value(hint: Any, metadata: Mapping[str, Any], formats: tuple[str, ...]) -> dict[str, Any]:
    origin, args = get_origin(hint), get_args(hint)
    if metadata["choices"] is not None:
        return {"enum": [list(choice) for choice in metadata["choices"]]}
    if hint is Pattern:
        return {"type": "string", "minLength": 1}
    if origin is Literal:
        return {"enum": list(args)}
    if origin is tuple:
        array: dict[str, Any] = {"type": "array", "items": _value(args[0], metadata, formats)}
        if entry_class(hint) is None and metadata["regex"] is None:
            array["maxItems"] = MAX_ENTRIES
        return array
    if hint is bool:
        return {"type": "boolean"}
    if hint is str:
        regex = metadata["regex"]
        return {"type": "string"} if regex is None else {"type": "string", "pattern": f"^({regex})$"}
    if hint in (int, float):
        limits = {"minimum": "minimum", "above": "exclusiveMinimum", "maximum": "maximum"}
        bounds = {word: metadata[key] for key, word in limits.items() if metadata[key] is not None}
        return {"type": "integer" if hint is int else "number", **bounds}
    return _table(cast("type", hint), formats)
