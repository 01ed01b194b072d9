"""Tool calls in the text of an answer, as Qwen3-Coder and Nemotron 3 write them:

<tool_call>
<function=name>
<parameter=key>
value
</parameter>
</function>
</tool_call>
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

BEGIN, END = "<tool_call>", "</tool_call>"
_FUNCTION = re.compile(r"\s*<function=([^>\s]+)>")
_FUNCTION_END = re.compile(r"\s*</function>\s*")
_PARAMETER = re.compile(r"\s*<parameter=([^>\s]+)>")
_PARAMETER_END = re.compile(r"\s*</parameter>")
_TEXT = re.compile(r"\n?(.*?)\n?</parameter>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Call:
    """A call that the model asks for."""

    name: str
    arguments: str
    """A JSON object."""


class _BrokenOffError(Exception):
    """A text ends inside of a parameter."""


def parse_call(text: str, tools: Mapping[str, Mapping[str, Any]]) -> Call | None:
    """Return the call between the tags, or None where there is none; `tools` are names and JSON schemas.

    A value is a text where the schema says so, else JSON, or a text where it is none.
    """
    try:
        return _call(text, tools)
    except _BrokenOffError:
        return None


def _call(text: str, tools: Mapping[str, Mapping[str, Any]]) -> Call | None:
    function = _FUNCTION.match(text)
    if function is None or function[1] not in tools:
        return None
    listed = tools[function[1]].get("properties")
    properties = cast("dict[str, Any]", listed) if isinstance(listed, dict) else {}
    arguments: dict[str, object] = {}
    at = function.end()
    while (parameter := _PARAMETER.match(text, at)) is not None:
        arguments[parameter[1]], at = _value(text, parameter.end(), properties.get(parameter[1]))
    if _FUNCTION_END.fullmatch(text, at) is None:
        return None
    return Call(function[1], json.dumps(arguments, ensure_ascii=False))


def is_text(schema: Any) -> bool:
    """Whether values of a schema are written as they are, and not as JSON."""
    return isinstance(schema, dict) and cast("dict[str, Any]", schema).get("type") == "string"


def _value(text: str, at: int, schema: Any) -> tuple[object, int]:
    """Return the value that begins at `at`, and where its parameter ends; JSON may hold what looks like an end."""
    if not is_text(schema):
        try:
            value, end = _JSON.raw_decode(text, len(text) - len(text[at:].lstrip()))
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
        except (ValueError, RecursionError):
            pass
        else:
            closing = _PARAMETER_END.match(text, end)
            if closing is not None:
                return value, closing.end()
    found = _TEXT.match(text, at)
    if found is None:
        raise _BrokenOffError
    return found[1], found.end()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


_JSON = json.JSONDecoder(parse_constant=_refuse_constant)


@dataclass(slots=True)
class ToolCallStream:
    """Text in; text and calls out, in order. Text that may begin a tag or is inside of one is kept back.

    White space before and behind calls is not part of the text.
    """

    tools: Mapping[str, Mapping[str, Any]]
    _pending: str = field(default="", init=False)
    _space: str = field(default="", init=False)
    """White space that is text if more text follows."""
    _searched: int = field(default=0, init=False)
    """Up to where no end tag of the call that is pending was found."""
    _called: bool = field(default=False, init=False)

    def feed(self, text: str) -> list[str | Call]:
        """Return what is certain now."""
        self._pending += text
        found: list[str | Call] = []
        while (begin := self._pending.find(BEGIN)) >= 0:
            end = self._pending.find(END, max(begin, self._searched))
            if end < 0:
                break
            try:
                call = _call(self._pending[begin + len(BEGIN) : end], self.tools)
            except _BrokenOffError:  # the tag is part of a value
                self._searched = end + len(END)
                continue
            end += len(END)
            found += [self._pending[:end]] if call is None else [self._pending[:begin], call]
            self._pending, self._searched = self._pending[end:], 0
        kept = begin if begin >= 0 else len(self._pending) - overlap(self._pending, BEGIN)
        found.append(self._pending[:kept])
        self._pending, self._searched = self._pending[kept:], max(0, self._searched - kept)
        return [each for each in map(self._without_space, found) if each]

    def finish(self) -> str:
        """Return what was kept back: a call that was not completed is text."""
        rest, self._pending = self._pending, ""
        return self._space + rest if rest or not self._called else ""

    def _without_space(self, each: str | Call) -> str | Call:
        if isinstance(each, Call):
            self._called, self._space = True, ""
            return each
        text = (self._space + each).rstrip()
        self._space = (self._space + each)[len(text) :]
        return text


def overlap(text: str, tag: str) -> int:
    """Return how many characters at the end of `text` begin `tag`."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-n:])), 0)


def schemas(tools: Sequence[Any]) -> dict[str, Mapping[str, Any]]:
    """Return the names and JSON schemas of tools of a request."""
    return {tool.function.name: tool.function.parameters or {} for tool in tools}
