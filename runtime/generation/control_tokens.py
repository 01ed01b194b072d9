"""What is written as a special token in a user's text is text: the rule of transformers' `sanitize_control_tokens`.

Before a template is rendered, such places in its inputs are put between two private characters. In the rendered text
these are encoded as text, and the special tokens that the template writes are encoded as such.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError

from .tokenizer import Tokenizer

START, END = "\U000f0000", "\U000f0001"


def control_tokens(tokenizer: Tokenizer, template_text: str = "") -> tuple[str, ...]:
    """Return the added tokens that text must not become: special ones, and those that the template writes."""
    return tuple(
        token
        for token, special in tokenizer.added.items()
        if special or (token in template_text and not token.isspace())
    )


def marked(value: Any, tokens: Sequence[str]) -> Any:
    """Return `value`, a text or lists and dicts of texts, with every one of `tokens` in it between the marks.

    Keys of dicts are not marked.
    """
    if isinstance(value, str):
        text = value.replace(START, "").replace(END, "")
        return _pattern(tuple(tokens)).sub(f"{START}\\g<0>{END}", text) if tokens else text
    if isinstance(value, dict):
        return {key: marked(each, tokens) for key, each in cast("dict[object, object]", value).items()}
    if isinstance(value, list):
        return [marked(each, tokens) for each in cast("list[object]", value)]
    return value


def encode_marked(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a rendered text: marked tokens as text, others as tokens, without those that begin a prompt.

    A mark alone, which a template may leave by splitting a text, parts what stands at its sides.
    Raises N3CError (E0843, exit code 2) where a tokenizer makes a marked token of text, too.
    """
    pattern = re.compile(f"{START}({_pattern(tuple(tokenizer.added)).pattern}){END}|[{START}{END}]")
    pieces = pattern.split(text)  # text, marked token or None, text, …
    ids = tokenizer.encode(pieces[0], special=False)
    for index, piece in enumerate(pieces[1:], start=1):
        if not piece:
            continue
        plain = index % 2 == 1
        more = _inner(tokenizer, piece, plain)
        if plain and set(tokenizer.encode(piece, special=False)) & set(more) and len(more) == 1:
            raise N3CError(Diagnostic("E0843", f"the tokenizer makes {piece!r} of text, too"), ExitCode.USAGE)
        ids += more
    return ids


def encode_text(tokenizer: Tokenizer, text: str, *, parse_special: bool) -> list[int]:
    """Return the ids of a prompt with the tokens that begin it; its text holds special tokens with `parse_special`."""
    if parse_special or not any(token in text for token in control_tokens(tokenizer)):
        return tokenizer.encode(text)
    return tokenizer.encode("") + encode_marked(tokenizer, marked(text, control_tokens(tokenizer)))


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, object]],
    variables: Mapping[str, object],
    literals: str,
    render: Callable[[Sequence[Mapping[str, object]], Mapping[str, object]], str],
    *,
    parse_special: bool,
) -> list[int]:
    """Return the ids of a chat, by a template that writes `literals`; `render` makes the text."""
    if parse_special:
        return tokenizer.encode(render(messages, variables), special=False)
    tokens = control_tokens(tokenizer, literals)
    return encode_marked(tokenizer, render(marked(list(messages), tokens), marked(dict(variables), tokens)))


def _inner(tokenizer: Tokenizer, piece: str, plain: bool) -> list[int]:
    """Return the ids of a piece of a text that is not its beginning, where some tokenizers add a space."""

    def encode(text: str) -> list[int]:
        return tokenizer.encode_plain(text) if plain else tokenizer.encode(text, special=False)

    newline = tokenizer.encode("\n", special=False)
    ids = encode("\n" + piece)
    return ids[len(newline) :] if ids[: len(newline)] == newline else encode(piece)


@lru_cache(maxsize=8)
def _pattern(tokens: Collection[str]) -> re.Pattern[str]:
    """Return what matches any of `tokens`, of several the longest."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")
