"""A limit on reasoning: after so many tokens between the thinking tags the end tag is forced."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Tags:
    """The token ids of `<think>` and `</think>`: one each, or several."""

    start: tuple[int, ...]
    end: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Reasoning:
    """The state of a sequence's reasoning. Immutable, so drafts are followed without changing the sequence."""

    tags: Tags
    budget: int | None
    """Tokens allowed after the start tag; None: no limit."""
    tail: tuple[int, ...] = ()
    """The last tokens, as many as a tag is long."""
    used: int | None = None
    """Tokens after the start tag so far; None outside of the tags."""
    forced: tuple[int, ...] = ()
    """Tokens still to come of the end tag that is being forced."""

    def begin(self, prompt: Iterable[int]) -> Reasoning:
        """Return the state after `prompt`: where that ends inside the tags, counting starts at its end."""
        state = self
        for token in prompt:
            state = replace(state, forced=(), used=None if state.used is None else 0).after(token)
        return state if state.used is None else replace(state, used=0)._limited()

    def after(self, token: int) -> Reasoning:
        """Return the state after `token`."""
        tail = (*self.tail, token)[-max(len(self.tags.start), len(self.tags.end)) :]
        used = None if self.used is None else self.used + 1
        forced = self.forced[1:] if self.forced and self.forced[0] == token else ()
        if used is not None and tail[-len(self.tags.end) :] == self.tags.end:
            used = None
        elif used is None and tail[-len(self.tags.start) :] == self.tags.start:
            used = 0
        return replace(self, tail=tail, used=used, forced=forced)._limited()

    @property
    def next(self) -> int | None:
        """The token that must follow, or None where the model chooses."""
        return self.forced[0] if self.forced else None

    def _limited(self) -> Reasoning:
        if self.used is None or self.budget is None or self.used < self.budget or self.forced:
            return self
        return replace(self, forced=self.tags.end[self._begun() :])

    def _begun(self) -> int:
        """Return how many tokens of the end tag already stand at the end, all of them after the start tag."""
        end = self.tags.end
        longest = min(len(end) - 1, self.used or 0)
        return next((n for n in range(longest, 0, -1) if self.tail[-n:] == end[:n]), 0)
