"""States of what was read before, found by the longest common prefix of tokens.

Recurrent states cannot be cut: they are kept where they were, at ends of chunks and of sequences. An entry holds them
there, and the places of the caches since the entry before it, so that a path of entries is one copy of everything.
The drafter's cache at the last of n tokens depends on token n too: with drafts, an entry is only for prompts that go on
with the token that it was made with.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from n3c.runtime.engines.interface import Snapshot

Key = tuple[int, ...]


@dataclass(slots=True, eq=False)
class Entry:
    """States after `tokens` tokens."""

    tokens: int
    parent: Entry | None = None
    key: Key = ()
    """The tokens since the parent; with drafts also the one that followed."""
    snapshot: Snapshot | None = None
    children: dict[Key, Entry] = field(default_factory=dict[Key, "Entry"])
    lengths: Counter[int] = field(default_factory=Counter[int])
    """Of the children's keys."""


@dataclass(slots=True)
class PrefixCache:
    """Entries of at most `memory` bytes; the least recently used ones go first, those that others continue last."""

    memory: int
    drafts: bool
    """Whether a drafter's cache is among the states."""
    bytes: int = field(default=0, init=False)
    hits: int = field(default=0, init=False)
    """Prompts of which a part was found."""
    tokens_found: int = field(default=0, init=False)
    _root: Entry = field(default_factory=lambda: Entry(0), init=False)
    _used: OrderedDict[int, Entry] = field(default_factory=OrderedDict[int, Entry], init=False)
    """Entries by identity, the least recently used first."""

    def longest(self, prompt: Sequence[int]) -> Entry:
        """Return the entry of the longest prefix of `prompt` that leaves a token to read; the empty one without any."""
        entry, following = self._root, self._next(self._root, prompt)
        while following is not None:
            entry, following = following, self._next(following, prompt)
        if entry.tokens:
            self.hits += 1
            self.tokens_found += entry.tokens
            self._touch(entry)
        return entry

    def path(self, entry: Entry | None) -> Iterator[Snapshot]:
        """Yield what is to be restored, in this order, for the states of an entry."""
        entries: list[Entry] = []
        while entry is not None and entry.snapshot is not None:
            entries.append(entry)
            entry = entry.parent
        for each in reversed(entries):
            assert each.snapshot is not None
            yield each.snapshot

    def keep(self, parent: Entry, sequence: Sequence[int], tokens: int, snapshot: Snapshot) -> Entry:
        """Keep the states after `tokens` of a `sequence` that began as `parent`, and return their entry."""
        key = tuple(sequence[parent.tokens : tokens + self.drafts])
        known = parent.children.get(key)
        if known is not None:
            self._touch(known)
            return known
        entry = Entry(tokens, parent, key, snapshot)
        parent.children[key] = entry
        parent.lengths[len(key)] += 1
        self.bytes += snapshot.bytes
        self._touch(entry)
        self._shrink()
        return entry

    def clear(self) -> None:
        """Forget everything: the weights are others."""
        self._root, self.bytes = Entry(0), 0
        self._used.clear()

    def holds(self, entry: Entry) -> bool:
        """Whether an entry is still there, so that others may continue it."""
        return entry is self._root or id(entry) in self._used

    def _next(self, entry: Entry, prompt: Sequence[int]) -> Entry | None:
        """Return the longest child of an entry that `prompt` goes on with and past."""
        for length in sorted(entry.lengths, reverse=True):
            key = tuple(prompt[entry.tokens : entry.tokens + length])
            child = entry.children.get(key)
            if child is not None and child.tokens < len(prompt):
                return child
        return None

    def _touch(self, entry: Entry) -> None:
        """Make an entry and all before it the most recently used."""
        each: Entry | None = entry
        while each is not None and each.snapshot is not None:
            self._used[id(each)] = each
            self._used.move_to_end(id(each))
            each = each.parent

    def _shrink(self) -> None:
        """Drop the least recently used entries that none continues until the rest is within the memory."""
        while self.bytes > self.memory:
            leaf = next((entry for entry in self._used.values() if not entry.children), None)
            if leaf is None:
                return
            assert leaf.parent is not None and leaf.snapshot is not None
            del self._used[id(leaf)], leaf.parent.children[leaf.key]
            leaf.parent.lengths -= Counter([len(leaf.key)])
            self.bytes -= leaf.snapshot.bytes
            leaf.snapshot = None
