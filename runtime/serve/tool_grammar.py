"""The grammar of answers that call tools, in llguidance's dialect of Lark.

Calls have the form that chat templates of Qwen3-Coder and Nemotron 3 write, and that `tool_calls` reads. Parameters
come in the order of the schema. Texts stand as they are, up to `</parameter>`; every other value is JSON of its schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from .errors import ApiError
from .tool_calls import BEGIN, END, is_text

LITERALS = (f"{BEGIN}\n<function=", "<parameter=", "\n</parameter>\n", f"</function>\n{END}")
"""What a template writes whose calls have this form."""
_ANNOTATIONS = frozenset(
    ("title", "description", "default", "examples", "format", "$comment", "deprecated", "readOnly", "writeOnly")
)
_DEFINITIONS = ("$defs", "definitions")
_OF_OBJECTS = _ANNOTATIONS | {"type", "properties", "required", "additionalProperties", "$schema", *_DEFINITIONS}
_OF_TEXTS = _ANNOTATIONS | {"type", "enum", "const", "minLength", "maxLength", "pattern"}
_AS_WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As the `tojson` of templates writes: white space without end cannot follow."""
_CLOSED = r"~/(?s:.*)<\/parameter>(?s:.*)/"


@dataclass(frozen=True, slots=True)
class Answer:
    """What an answer may be."""

    tools: Mapping[str, Mapping[str, Any]]
    """Names of the functions that may be called, and the JSON schemas of their parameters."""
    required: bool
    """Whether it has at least one call."""
    several: bool
    """Whether it may have more than one."""
    schema: Mapping[str, Any] | None = None
    """Of what it is without a call; None: any text, which may also come before a call."""


def grammar(answer: Answer, token: Callable[[str], int | None]) -> str:
    """Return the grammar; `token` gives the id of a tag that is one token of its own.

    ApiError (400) for a schema whose values cannot be written in this form, or are not held to it.
    """
    return "\n".join(_lines(answer, token))


def _lines(answer: Answer, token: Callable[[str], int | None]) -> Iterator[str]:
    begin, end = (_tag(token(text), text) for text in (BEGIN, END))
    yield r"LEAD: /[ \n]{1,4}/"
    if answer.required or answer.schema is not None:
        yield f"opening: LEAD? {begin}"
    elif token(BEGIN) is not None:
        yield f"opening: PLAIN? {begin}"
    else:
        yield f"opening[lazy]: /(?s:.*)/ {begin}"
    more = f'("\\n" {begin} call)* "\\n"?' if answer.several else ""
    yield f"calls: opening call {more}"
    if answer.required:
        yield "start: calls"
    elif answer.schema is not None:
        yield "start: calls | LEAD? answer"
        yield f"answer: {_json(answer.schema, answer.schema, {})}"
    else:
        yield "start: calls | PLAIN?"
        yield f"PLAIN: /(?s:.*)/ & ~/(?s:.*){BEGIN}(?s:.*)/"
    yield f'call: "\\n" ({" | ".join(f"f{index}" for index in range(len(answer.tools)))}) {end}'
    for index, (name, schema) in enumerate(answer.tools.items()):
        yield from _function(f"f{index}", name, schema)


def _tag(token: int | None, text: str) -> str:
    return _quoted(text) if token is None else f"<[{token}]>"


def _function(rule: str, name: str, schema: Mapping[str, Any]) -> Iterator[str]:
    _require_known(name, schema, _OF_OBJECTS)
    given, required = schema.get("properties") or {}, schema.get("required") or ()
    if schema.get("type", "object") != "object" or not isinstance(given, dict) or not _is_names(required):
        raise _refused(name, "it is no schema of an object")
    others = {each: schema.get("additionalProperties", True) for each in required if each not in given}
    properties: dict[str, Any] = {**given, **others}
    uses: list[str] = []
    for index, (parameter, value) in enumerate(properties.items()):
        if not parameter or any(letter.isspace() or letter == ">" for letter in parameter):
            raise _refused(name, f"no parameter can have the name {parameter!r}")
        uses.append(f"{rule}_{index}" + ("" if parameter in required else "?"))
        yield from _parameter(f"{rule}_{index}", f"{name}.{parameter}", parameter, value, schema)
    yield f"{rule}: {_quoted(f'<function={name}>' + chr(10))} {' '.join(uses)} {_quoted('</function>' + chr(10))}"


def _parameter(rule: str, place: str, name: str, schema: Any, root: Mapping[str, Any]) -> Iterator[str]:
    opened, closed = _quoted(f"<parameter={name}>\n"), _quoted("\n</parameter>\n")
    if is_text(schema):
        yield f"{rule.upper()}: {_text(place, schema)}"
        yield f"{rule}_value[lazy]: {rule.upper()} {closed}"
        yield f"{rule}: {opened} {rule}_value"
    else:
        yield f"{rule}: {opened} {rule}_value {closed}"
        yield f"{rule}_value: {_json(schema, root, _AS_WRITTEN)}"


def _text(place: str, schema: Mapping[str, Any]) -> str:
    """Return a terminal of the texts of a schema that a parameter can hold."""
    _require_known(place, schema, _OF_TEXTS)
    lists = [*([[schema["const"]]] if "const" in schema else []), *([schema["enum"]] if "enum" in schema else [])]
    parts = [f"({' | '.join(map(_quoted, _writable(place, each)))})" for each in lists]
    least, most = (_length(place, schema.get(key, default)) for key, default in (("minLength", 0), ("maxLength", None)))
    parts.append(f"/(?s:.{{{least},{most}}})/")
    if "pattern" in schema:
        parts.append(_pattern(place, schema["pattern"]))
    return " & ".join((*parts, _CLOSED))


def _writable(place: str, given: object) -> list[str]:
    """Return the texts of a list that a parameter can hold."""
    listed = cast("list[object]", given) if isinstance(given, list) else []
    texts = [each for each in listed if isinstance(each, str) and "</parameter>" not in each]
    if not texts:
        raise _refused(place, "it has no text that a parameter can hold")
    return texts


def _length(place: str, length: object) -> str:
    if length is None:
        return ""
    if isinstance(length, bool) or not isinstance(length, int) or length < 0:
        raise _refused(place, f"{length!r} is no length of a text")
    return str(length)


def _pattern(place: str, pattern: object) -> str:
    """Return the texts in which a pattern of JSON Schema is found; anchors are understood at its ends only."""
    if not isinstance(pattern, str):
        raise _refused(place, f"{pattern!r} is no pattern")
    items = re.findall(r"\\?.", pattern, re.DOTALL)  # characters, and escaped ones
    before, after = items[:1] != ["^"], items[-1:] != ["$"]
    inner = items[not before : len(items) - (not after)]
    if not (before and after) and "|" in _outside_of_groups(inner):
        raise _refused(place, "a pattern with `|` beside `^` or `$`")
    written = "".join({"/": "\\/", "\n": "\\n"}.get(item, item) for item in inner)
    return f"/{'(?s:.*)' * before}(?:{written}){'(?s:.*)' * after}/"


def _outside_of_groups(items: Sequence[str]) -> Iterator[str]:
    """Yield the items of a pattern that stand in no parentheses and no brackets."""
    depth, bracket = 0, False
    for item in items:
        bracket = item == "[" or (bracket and item != "]")
        if not bracket:
            depth += (item == "(") - (item == ")")
            if depth == 0:
                yield item


def _json(schema: Any, root: Mapping[str, Any], spaces: Mapping[str, object]) -> str:
    """Return the nonterminal of the JSON of a part of a schema, which may refer to definitions of the whole."""
    whole = dict(cast("Mapping[str, Any]", schema)) if isinstance(schema, Mapping) else {"anyOf": [schema]}
    definitions = {key: root[key] for key in _DEFINITIONS if key in root}
    options = {"x-guidance": {"lenient": False, **spaces}}
    return f"%json {json.dumps({**definitions, **whole, **options}, ensure_ascii=False)}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _require_known(place: str, schema: Mapping[str, Any], known: frozenset[str]) -> None:
    unknown = sorted(schema.keys() - known)
    if unknown:
        raise _refused(place, f"answers cannot be held to `{unknown[0]}` there")


def _is_names(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in cast("list[object]", value))


def _refused(place: str, reason: str) -> ApiError:
    return ApiError(400, f"tools: `{place}`: {reason}", param="tools", code="E0841")
