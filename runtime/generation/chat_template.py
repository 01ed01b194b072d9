"""Chat templates of checkpoints: messages to the text of a prompt, in the sandbox of jinja2, as transformers does it.

The environment is that of transformers 5.23 (`utils/chat_template_utils.py`): blocks trimmed, `break` and `continue`,
JSON without HTML escapes, and `dict` and `namespace` that lead nowhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Span
from n3c.ir.json_file import read_bounded, read_json

_MAX_BYTES = 1 << 22
"""Largest template; those of released models have some thousand bytes."""
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names that clients and templates give the reasoning of a message."""
_FAULTS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
    MemoryError,
)
"""What a template may raise."""

Message = Mapping[str, object]


@dataclass(frozen=True)
class ChatTemplate:
    """A template, and the special tokens that it may name."""

    text: str
    tokens: Mapping[str, str]
    """`bos_token`, `eos_token`, … → the token."""

    def render(self, messages: Sequence[Message], variables: Mapping[str, object]) -> str:
        """Return the prompt; `variables` are `tools`, `add_generation_prompt` and whatever else the template reads.

        N3CError (E0840, exit code 2) where the template refuses the messages, or is none.
        """
        given = {"tools": None, "documents": None, "add_generation_prompt": True, **self.tokens, **variables}
        try:
            return self._compiled.render(messages=[_with_reasoning(message) for message in messages], **given)
        except _FAULTS as error:
            raise _refused(error) from error

    @cached_property
    def _compiled(self) -> jinja2.Template:
        return _environment().from_string(self.text)

    @property
    def literals(self) -> str:
        """What the template itself writes: its texts and string constants, with NUL in between."""
        try:
            parsed = _environment().parse(self.text)
        except jinja2.TemplateError as error:
            raise _refused(error) from error
        texts = {node.data for node in parsed.find_all(nodes.TemplateData)}
        texts |= {node.value for node in parsed.find_all(nodes.Const) if isinstance(node.value, str)}
        return "\0".join(texts)


def find_chat_template(weights: Path) -> ChatTemplate | None:
    """Return the template of a checkpoint: `chat_template.jinja`, else that of tokenizer_config.json; None without one.

    Of several in tokenizer_config.json it is the one named `default`. N3CError (E0840, exit code 6) for a damaged file.
    """
    config = _config(weights / "tokenizer_config.json")
    tokens = {name: text for name in _TOKENS if (text := _content(config.get(name))) is not None}
    path = weights / "chat_template.jinja"
    try:
        text = read_bounded(path, _MAX_BYTES).decode("utf-8") if path.is_file() else _named(config.get("chat_template"))
    except (OSError, ValueError) as error:
        raise N3CError(Diagnostic("E0840", f"cannot be read: {error}", Span(str(path))), ExitCode.FILE) from error
    return None if text is None else ChatTemplate(text, tokens)


def _config(path: Path) -> dict[str, object]:
    if not path.is_file():
        return {}
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise N3CError(Diagnostic("E0840", f"cannot be read: {error}", Span(str(path))), ExitCode.FILE) from error
    if not isinstance(config, dict):
        raise N3CError(Diagnostic("E0840", "not a JSON object", Span(str(path))), ExitCode.FILE)
    return cast("dict[str, object]", config)


def _content(token: object) -> str | None:
    """Return a token that is a text, or an object with its `content`."""
    content = cast("dict[str, object]", token).get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _named(template: object) -> str | None:
    if isinstance(template, list):
        entries = [cast("dict[str, object]", e) for e in cast("list[object]", template) if isinstance(e, dict)]
        template = next((entry.get("template") for entry in entries if entry.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _with_reasoning(message: Message) -> Message:
    """Return a message whose reasoning has the names that templates read."""
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _refused(error: Exception) -> N3CError:
    reason = str(error) or type(error).__name__
    return N3CError(Diagnostic("E0840", f"the chat template refuses the messages: {reason}"), ExitCode.USAGE)


class _Dict:
    """`dict` of a template, without the attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` of a template, whose attributes do not begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, positional = args[0], args[1:]
        attributes = dict(*positional, **kwargs)
        for name in attributes:
            _require_public(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_public(name)
        super().__setitem__(name, value)


def _require_public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"an attribute {name!r} of a namespace")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`, with which training marks what the assistant says: the text in it."""

    tags = {"generation"}  # noqa: RUF012, as its base declares it

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_caller"), [], [], body).set_lineno(line)

    def _caller(self, caller: Any) -> str:
        text: str = caller()
        return text


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
