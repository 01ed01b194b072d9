"""The text of a sequence as it grows, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from .tokenizer import Tokenizer


class GrowingText:
    """The text of one sequence. A stop string ends it and is not part of it.

    Special tokens are not part of the text either, but a stop string may be one, or hold one.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), shown: Collection[str] = ()) -> None:
        """`shown` are special tokens that are part of the text all the same."""
        self._tokenizer, self._stream = tokenizer, tokenizer.stream()
        self._shows_special = shown
        self._stops = tuple(stop for stop in stops if stop)
        self._pending = ""
        """Text that may turn out to be the beginning of a stop string."""
        self._shown: list[bool] = []
        """Of each character of it: whether it is text, and not of a special token."""
        self.text = ""
        """The text so far that no later token changes."""
        self.stopped = False

    def feed(self, token: int) -> str:
        """Take a token; return the text that became certain. `stopped` then says whether a stop string was found."""
        piece = self._take(self._stream.feed([token]))
        special = self._tokenizer.special(token)
        return piece if special is None else piece + self._take(special, shown=special in self._shows_special)

    def finish(self) -> str:
        """Return what was kept back, when no token follows."""
        if self.stopped:
            return ""
        piece = self._take(self._stream.finish())
        if not self.stopped:
            kept = _shown(self._pending, self._shown)
            self.text += kept
            self._pending, self._shown = "", []
            piece += kept
        return piece

    def _take(self, piece: str, *, shown: bool = True) -> str:
        if self.stopped:
            return ""
        text, shows = self._pending + piece, [*self._shown, *[shown] * len(piece)]
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, end = True, min(found)
            self._pending, self._shown = "", []
        else:
            end = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
            self._pending, self._shown = text[end:], shows[end:]
        certain = _shown(text[:end], shows)
        self.text += certain
        return certain


def _shown(text: str, shows: Sequence[bool]) -> str:
    """Return the characters of `text` that are shown."""
    return "".join(character for character, show in zip(text, shows, strict=False) if show)


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
