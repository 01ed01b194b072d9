"""Prompts, stops and thinking tags of the command line, as token ids."""

from __future__ import annotations

import re
from pathlib import Path

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Span

from .control_tokens import encode_chat, encode_text
from .reasoning import Tags
from .tokenizer import Tokenizer

_IDS = re.compile(r"\s*\d{1,12}(\s*,\s*\d{1,12})*\s*")


def read_prompts(path: Path) -> list[str]:
    """Return the lines of a text file that are not empty.

    N3CError: exit code 6 where it cannot be read, 2 where it has no such line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not UTF-8 text"
        raise N3CError(Diagnostic("E0601", f"cannot be read: {reason}", Span(str(path))), ExitCode.FILE) from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        help_ = "write one prompt a line"
        raise N3CError(Diagnostic("E0802", "no prompt in this file", Span(str(path)), help=help_), ExitCode.USAGE)
    return prompts


def parse_ids(text: str) -> list[int] | None:
    """Return the numbers of `1,2,3`, or None where `text` is something else."""
    return [int(part) for part in text.split(",")] if _IDS.fullmatch(text) else None


def encoded(text: str, tokenizer: Tokenizer | None, weights: Path, *, parse_special: bool) -> list[int]:
    """Return the token ids of a text; N3CError (exit code 6) where there is no tokenizer."""
    return encode_text(required(tokenizer, weights), text, parse_special=parse_special)


def encoded_chat(message: str, tokenizer: Tokenizer | None, weights: Path, *, parse_special: bool) -> list[int]:
    """Return the token ids of a chat that is one message of a user.

    N3CError: exit code 2 where the checkpoint has no chat template, 6 where there is no tokenizer.
    """
    from .chat_template import find_chat_template

    template = find_chat_template(weights)
    if template is None:
        help_ = "put chat_template.jinja beside the weights, or leave --chat out"
        raise N3CError(Diagnostic("E0840", "no chat template", Span(str(weights)), help=help_), ExitCode.USAGE)
    return encode_chat(
        required(tokenizer, weights),
        [{"role": "user", "content": message}],
        {},
        template.literals,
        template.render,
        parse_special=parse_special,
    )


def tag_ids(tags: tuple[str, str], tokenizer: Tokenizer | None, weights: Path) -> Tags:
    """Return the ids of the start and the end tag, each given as ids (`12,13`) or as text."""
    start, end = (
        tuple(ids) if (ids := parse_ids(tag)) else tuple(required(tokenizer, weights).encode(tag, special=False))
        for tag in tags
    )
    if not start or not end:
        raise N3CError(Diagnostic("E0811", "a thinking tag has no tokens"), ExitCode.USAGE)
    return Tags(start, end)


def required(tokenizer: Tokenizer | None, weights: Path) -> Tokenizer:
    """Return the tokenizer of a checkpoint; N3CError (E0805, exit code 6) where it has none."""
    if tokenizer is None:
        message = "no tokenizer.json in the checkpoint, and the vocabulary is not bytes"
        help_ = "put the model's tokenizer.json beside the weights, or give token ids"
        raise N3CError(Diagnostic("E0805", message, Span(str(weights)), help=help_), ExitCode.FILE)
    return tokenizer
