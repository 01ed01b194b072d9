"""Reasoning apart from the answer, in text as it comes."""

from __future__ import annotations

from dataclasses import dataclass, field

from .tool_calls import overlap

START, END = "<think>", "</think>"


@dataclass(slots=True)
class ReasoningStream:
    """Text in; reasoning and answer out. The tags belong to neither."""

    inside: bool
    """Whether the text begins between the tags, which the prompt has opened."""
    _pending: str = field(default="", init=False)
    _decided: bool = field(default=False, init=False)
    """Whether the text has begun with something else than the start tag, or the reasoning is over."""

    @property
    def reasons(self) -> bool:
        """Whether the next text is between the tags."""
        return self.inside and not self._decided

    def feed(self, text: str) -> tuple[str, str]:
        """Return the reasoning and the answer that are certain now."""
        if self._decided:
            return "", text
        self._pending += text
        if not self.inside:
            if self._pending.startswith(START):
                self.inside, self._pending = True, self._pending[len(START) :]
            elif START.startswith(self._pending):
                return "", ""
            else:
                return "", self._rest()
        end = self._pending.find(END)
        if end >= 0:
            reasoning, self._pending = self._pending[:end], self._pending[end + len(END) :]
            return reasoning, self._rest()
        kept = len(self._pending) - overlap(self._pending, END)
        reasoning, self._pending = self._pending[:kept], self._pending[kept:]
        return reasoning, ""

    def finish(self) -> tuple[str, str]:
        """Return what was kept back."""
        rest, self._pending = self._pending, ""
        return (rest, "") if self.inside and not self._decided else ("", rest)

    def _rest(self) -> str:
        self._decided = True
        rest, self._pending = self._pending, ""
        return rest
