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
_CALL = re.compile(r"\s*<function=([^>\s]+)>(.*)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Call:
    """A call that the model asks for."""

    name: str
    arguments: str
    """A JSON object."""


def parse_call(text: str, tools: Mapping[str, Mapping[str, Any]]) -> Call | None:
    """Return the call between the tags, or None where there is none; `tools` are names and JSON schemas.

    A value is a text where the schema says so, else JSON, or a text where it is none.
    """
    found = _CALL.fullmatch(text)
    if found is None or found[1] not in tools:
        return None
    properties = tools[found[1]].get("properties")
    types = cast("dict[str, Any]", properties) if isinstance(properties, dict) else {}
    arguments: dict[str, object] = {}
    end = 0
    for parameter in _PARAMETER.finditer(found[2]):
        if parameter.start() != end:
            return None
        arguments[parameter[1]] = _value(parameter[2], types.get(parameter[1]))
        end = parameter.end()
    return Call(found[1], json.dumps(arguments, ensure_ascii=False)) if not found[2][end:].strip() else None


def _value(text: str, schema: Any) -> object:
    if isinstance(schema, dict) and cast("dict[str, Any]", schema).get("type") == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


@dataclass(slots=True)
class ToolCallStream:
    """Text in; text and calls out, in order. Text that may begin a tag or is inside of one is kept back."""

    tools: Mapping[str, Mapping[str, Any]]
    _pending: str = field(default="", init=False)

    def feed(self, text: str) -> list[str | Call]:
        """Return what is certain now."""
        self._pending += text
        found: list[str | Call] = []
        while (begin := self._pending.find(BEGIN)) >= 0:
            end = self._pending.find(END, begin)
            if end < 0:
                break
            call = parse_call(self._pending[begin + len(BEGIN) : end], self.tools)
            end += len(END)
            if call is None:
                found.append(self._pending[:end])
            else:
                found += [self._pending[:begin], call]
            self._pending = self._pending[end:]
        kept = begin if begin >= 0 else len(self._pending) - overlap(self._pending, BEGIN)
        found.append(self._pending[:kept])
        self._pending = self._pending[kept:]
        return [each for each in found if each]

    def finish(self) -> str:
        """Return what was kept back: a call that was not completed is text."""
        rest, self._pending = self._pending, ""
        return rest


def overlap(text: str, tag: str) -> int:
    """Return how many characters at the end of `text` begin `tag`."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-n:])), 0)


def schemas(tools: Sequence[Any]) -> dict[str, Mapping[str, Any]]:
    """Return the names and JSON schemas of tools of a request."""
    return {tool.function.name: tool.function.parameters or {} for tool in tools}
