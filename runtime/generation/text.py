"""The text of a sequence as it grows, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Sequence

from .tokenizer import Tokenizer


class GrowingText:
    """The text of one sequence. A stop string ends it and is not part of it."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._stream = tokenizer.stream()
        self._stops = tuple(stop for stop in stops if stop)
        self._pending = ""
        """Text that may turn out to be the beginning of a stop string."""
        self.text = ""
        """What is certain."""
        self.stopped = False

    def feed(self, token: int) -> str:
        """Take a token; return the text that became certain. `stopped` then says whether a stop string was found."""
        return self._take(self._stream.feed([token]))

    def finish(self) -> str:
        """Return what was kept back, when no token follows."""
        if self.stopped:
            return ""
        piece = self._take(self._stream.finish())
        if not self.stopped:
            piece += self._pending
            self.text += self._pending
            self._pending = ""
        return piece

    def _take(self, piece: str) -> str:
        if self.stopped:
            return ""
        text = self._pending + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, certain, self._pending = True, text[: min(found)], ""
        else:
            kept = max((_overlap(text, stop) for stop in self._stops), default=0)
            certain, self._pending = text[: len(text) - kept], text[len(text) - kept :]
        self.text += certain
        return certain


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
