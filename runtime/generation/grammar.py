"""Tokens that a JSON schema or another grammar allows next, by llguidance; drafts are followed and taken back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError

from .tokenizer import Tokenizer

ANY_OBJECT: Mapping[str, object] = {"type": "object"}
"""The schema of OpenAI's `json_object`."""


@dataclass(frozen=True, slots=True)
class Grammars:
    """Compiles grammars for one tokenizer."""

    library: Any
    """llguidance's tokenizer."""
    ends: frozenset[int]
    """Tokens that end a sequence: allowed where a text may end."""

    @staticmethod
    def of(tokenizer: Tokenizer, vocab_size: int, ends: frozenset[int]) -> Grammars:
        """Return the grammars of a tokenizer; takes a second for a large vocabulary.

        Raises ModuleNotFoundError without llguidance.
        """
        from llguidance import LLTokenizer, TokenizerWrapper

        return Grammars(LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer, vocab_size))), ends)

    def schema(self, schema: Mapping[str, object]) -> Grammar:
        """Return the grammar of the JSON texts that fit a schema. N3CError (E0841, exit code 2) for a bad schema."""
        from llguidance import LLMatcher

        try:
            return self._compiled(LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={"lenient": False}))
        except ValueError as error:
            raise _refused(str(error)) from error

    def lark(self, text: str) -> Grammar:
        """Return the grammar of a text in llguidance's dialect of Lark; N3CError (E0841, exit code 2) for a bad one."""
        from llguidance import LLMatcher

        return self._compiled(LLMatcher.grammar_from_lark(text))

    def _compiled(self, grammar: str) -> Grammar:
        from llguidance import LLMatcher

        matcher = LLMatcher(self.library, grammar, log_level=0)
        if matcher.is_error():
            raise _refused(matcher.get_error())
        return Grammar(_Matcher(matcher, self.ends))


class _Vocabulary:
    """A tokenizer as llguidance wants it. No text has an added token, as `</think>`, not even a schema's string."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.special_token_ids = [tokenizer.encode(token, special=False)[0] for token in tokenizer.added]
        self.special_token_ids.append(vocab_size)
        self.tokens = [*map(tokenizer.token_bytes, range(vocab_size)), b"<end>"]
        self.eos_token_id = vocab_size
        """A token of its own, which nothing draws: `Grammar` has the ends, of which there may be several or none."""
        self.bos_token_id = None

    def __call__(self, text: bytes | str) -> list[int]:
        """Return the ids of a text, which is not yet complete where it is bytes."""
        return self._tokenizer.encode_plain(text if isinstance(text, str) else text.decode())


@dataclass(slots=True)
class _Matcher:
    """llguidance's matcher, which is moved to wherever a question is asked: `at` is the last place."""

    library: Any
    ends: frozenset[int]
    at: Grammar | None = None

    def move(self, place: Grammar) -> None:
        """Take back tokens up to where the paths of the last place and of `place` part, and go on from there."""
        tokens: list[int] = []
        left: Grammar | None = self.at
        right: Grammar | None = place
        back = 0
        while left is not right:
            if right is not None and (left is None or right.depth > left.depth):
                if right.parent is not None:
                    tokens.append(right.token)
                right = right.parent
            else:
                assert left is not None
                back += left.parent is not None
                left = left.parent
        if back:
            self.library.rollback(back)
        taken = self.library.try_consume_tokens(tokens[::-1])
        if taken < len(tokens) or self.library.is_error():
            reason = self.library.get_error() or "a token that the grammar does not allow"
            raise N3CError(Diagnostic("E0842", f"constrained decoding failed: {reason}"), ExitCode.NUMERICS)
        self.at = place


@dataclass(frozen=True, slots=True, eq=False)
class Grammar:
    """A place in a text of a grammar: after the tokens on the path of its parents. Immutable, as drafts need."""

    matcher: _Matcher
    parent: Grammar | None = None
    token: int = -1
    depth: int = 0
    complete: bool = field(default=False)
    """Whether the text ends there: by a token that ends a sequence, or since nothing may follow."""

    def copy(self) -> Grammar:
        """Return the beginning of another text of the same grammar."""
        return Grammar(_Matcher(self.matcher.library.deep_copy(), self.matcher.ends))

    def after(self, token: int) -> Grammar:
        """Return the place after `token`, which is allowed there; N3CError (E0842) where it is not."""
        if self.complete or token in self.matcher.ends:
            return self if self.complete else Grammar(self.matcher, self.parent, self.token, self.depth, True)
        place = Grammar(self.matcher, self, token, self.depth + 1)
        self.matcher.move(place)
        if self.matcher.library.is_stopped():
            object.__setattr__(place, "complete", True)
        return place

    def allowed(self, vocabulary: int) -> NDArray[np.bool_]:
        """Return which tokens may follow, [V]; all of them after the end, where none is asked for any more."""
        if self.complete:
            return np.ones(vocabulary, np.bool_)
        self.matcher.move(self)
        packed = np.frombuffer(self.matcher.library.compute_bitmask(), np.uint8)
        allowed = np.zeros(vocabulary, np.bool_)
        bits = np.unpackbits(packed, bitorder="little")[:vocabulary].view(np.bool_)
        allowed[: len(bits)] = bits
        ends = [token for token in self.matcher.ends if token < vocabulary]
        allowed[ends] = self.matcher.library.is_accepting()
        if not allowed.any():
            raise N3CError(Diagnostic("E0842", "constrained decoding failed: no token may follow"), ExitCode.NUMERICS)
        return allowed


def _refused(reason: str) -> N3CError:
    return N3CError(Diagnostic("E0841", f"the schema is refused: {reason}"), ExitCode.USAGE)
