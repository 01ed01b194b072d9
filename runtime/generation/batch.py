"""The sequences that run on an engine: they join and leave at every round, each at its own place.

A round feeds one chunk of every prompt that is not read yet, and gives every other sequence a token, or with a drafter
as many as stand. Sequences lie in the first rows of the engine, and the smallest of its batch sizes that holds them is
used; rows in between are fed zeros, which no other row sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.ir.diagnostics import N3CError
from n3c.runtime.engines.interface import Array, Engine, Snapshot, call

from .capacity import Capacity
from .drafter import Drafter
from .logprobs import TokenLogprobs, token_logprobs
from .prefix_cache import PrefixCache
from .sequence import Running
from .speculative import Draft, judge


@dataclass(frozen=True, slots=True)
class Taken:
    """A new token of a sequence, and the text that it made certain."""

    sequence: Running
    token: int
    text: str
    logprobs: TokenLogprobs | None
    """Where the sequence asks for them."""


@dataclass(slots=True)
class Batch:
    """Continues sequences on an engine, of which nobody else makes calls."""

    engine: Engine
    capacity: Capacity
    drafter: Drafter | None = None
    """None: no speculation."""
    cache: PrefixCache | None = None
    """None: every prompt is read from its first token on."""
    interleaved: bool = True
    """Whether sequences go on while prompts are read; else they wait."""
    rows: list[Running] = field(default_factory=list[Running], init=False)
    """The running sequences; the place of each is its row."""
    rounds: int = field(default=0, init=False)
    """Rounds, counted for each sequence: one gives a token, with speculation also the accepted drafts."""
    decoded: int = field(default=0, init=False)
    """Tokens that the rounds gave and that count, so none after a stop or a limit."""
    _suspended: dict[int, Snapshot] = field(default_factory=dict[int, Snapshot], init=False)
    """Row of a prompt that is half read → its states, which `decode` of the others moves on."""
    _taken: list[Taken] = field(default_factory=list[Taken], init=False)

    @property
    def free(self) -> int:
        """How many more sequences there is room for."""
        return self.engine.batch - len(self.rows)

    def add(self, sequence: Running) -> None:
        """Let a sequence join, with which nothing has been done yet."""
        row = len(self.rows)
        assert row < self.engine.batch
        self.engine.reset([row])
        self._find(row, sequence)
        self.rows.append(sequence)

    def replace_weights(self, checkpoint: Checkpoint) -> None:
        """Take other weights. Sequences that run go on with them, as prompts of the tokens that they have.

        N3CError (exit code 6) where they do not fit.
        """
        self._leave()
        self.engine.replace_weights(checkpoint)
        if self.cache is not None:
            self.cache.clear()
        self._suspended.clear()
        for row, sequence in enumerate(self.rows):
            sequence.again()
            self._find(row, sequence)

    def drop(self, sequence: Running) -> None:
        """Let a sequence leave where it is."""
        sequence.interrupt()
        self._leave()

    def clear(self) -> None:
        """Let all sequences leave."""
        for sequence in self.rows:
            sequence.interrupt()
        self._leave()

    def abandon(self, failure: N3CError) -> None:
        """Let all sequences fail, after an error of the engine: their states are unknown, and not kept."""
        for sequence in self.rows:
            sequence.fail(failure)
        self.rows.clear()
        self._suspended.clear()
        self._taken.clear()

    def round(self) -> list[Taken]:
        """Do one round; return the new tokens. A sequence that has ended is no longer in `rows`.

        One that fails, since its logits are not finite or a grammar goes wrong, ends alone.
        """
        self._leave()  # those that were interrupted since
        reading = [row for row, sequence in enumerate(self.rows) if not sequence.is_read]
        if reading:
            self._read(reading)
            self._leave()
        running = [row for row, sequence in enumerate(self.rows) if sequence.is_read]
        if running and (self.interleaved or not reading):
            if self.drafter is None:
                self._suspend()
                self._decode(running)
            else:
                self._speculate(self.drafter, running)
        taken, self._taken = self._taken, []
        self._leave()
        return taken

    def _find(self, row: int, sequence: Running) -> None:
        """Begin a sequence where the cache has the longest part of its prompt."""
        if self.cache is not None and not sequence.reads_logprobs:
            sequence.cached = self.cache.longest(sequence.prompt)
            for snapshot in self.cache.path(sequence.cached):
                self.engine.restore(row, snapshot)
            sequence.read = sequence.cached.tokens

    def _read(self, rows: Sequence[int]) -> None:
        """Feed a chunk of each prompt; a sequence gets its first token from the chunk in which its prompt ends."""
        chunk = self.engine.signatures["prefill"].inputs["input_ids"].shape[1]
        assert isinstance(chunk, int)
        inputs = {name: self._zeros(chunk) for name in ("input_ids", "following_ids")}
        inputs |= {"counts": self._zeros(), "lengths": self._lengths()}
        for row in rows:
            sequence = self.rows[row]
            if row in self._suspended:
                self.engine.restore(row, self._suspended.pop(row))
            begin = sequence.read
            end = min(begin + chunk - begin % chunk, len(sequence.prompt))  # chunks begin where others' begin
            end = begin + 1 if sequence.reads_logprobs else end
            inputs["input_ids"][row, : end - begin] = sequence.prompt[begin:end]
            following = sequence.prompt[begin + 1 : end + 1]
            inputs["following_ids"][row, : len(following)] = following
            inputs["counts"][row] = end - begin
        outputs = call(self.engine, "prefill", **inputs)
        for row in rows:
            sequence = self.rows[row]
            sequence.read += int(inputs["counts"][row])
            if sequence.reads_logprobs and not sequence.is_read:
                token, top = sequence.prompt[sequence.read], sequence.options.logprobs or 0
                sequence.prompt_logprobs.append(token_logprobs(outputs["logits"][row, 0], token, top))
            if sequence.is_read:
                self._begin(sequence, {name: value[row, 0] for name, value in outputs.items()})
            elif self.cache is not None and sequence.read % chunk == 0:
                self._keep(row, sequence.read)

    def _begin(self, sequence: Running, last: Mapping[str, Array]) -> None:
        """Give a sequence its first token, unless its limit is reached; `last` are the outputs at its prompt's end."""
        sequence.hidden = last.get("hidden")
        if sequence.options.max_new_tokens == 0 or len(sequence.tokens) >= self.capacity.context_length:
            sequence.ending = "length"
        else:
            self._draw(sequence, last["logits"])

    def _suspend(self) -> None:
        """Copy what `decode` would move on: it takes one token of every row."""
        for row, sequence in enumerate(self.rows):
            if not sequence.is_read and row not in self._suspended:
                self._suspended[row] = self.engine.snapshot(row, 0, 0)

    def _decode(self, rows: Sequence[int]) -> None:
        """Give every running sequence one token."""
        ids, lengths = self._zeros(1), self._lengths()
        for row in rows:
            ids[row, 0] = self.rows[row].tokens[-1]
        outputs = call(self.engine, "decode", input_ids=ids, lengths=lengths)
        for row in rows:
            sequence = self.rows[row]
            sequence.held = len(sequence.tokens)
            self._draw(sequence, outputs["logits"][row, 0])
            self._count(1)

    def _speculate(self, drafter: Drafter, rows: Sequence[int]) -> None:
        """Draft, verify, and keep what the rule accepts: one round of every running sequence."""
        tokens = self.engine.signatures["verify"].inputs["input_ids"].shape[1]
        assert isinstance(tokens, int)
        running = [self.rows[row] if row in rows else None for row in range(self._size)]
        lengths = self._lengths()
        proposals = drafter.propose(self.engine, running, lengths, tokens - 1)
        ids, accepted = self._zeros(tokens), self._zeros()
        for row in rows:
            sequence = self.rows[row]
            ids[row] = [sequence.tokens[-1], *(draft.token for draft in proposals[row])]
            accepted[row] = sequence.pending
        following = np.roll(ids, -1, axis=1)
        following[:, -1] = 0
        outputs = call(
            self.engine, "verify", input_ids=ids, following_ids=following, lengths=lengths, accepted=accepted
        )
        for row in rows:
            self.rows[row].held = int(lengths[row])
            self._accept(self.rows[row], proposals[row], {name: value[row] for name, value in outputs.items()})

    def _accept(self, sequence: Running, drafts: Sequence[Draft], outputs: Mapping[str, Array]) -> None:
        """Judge the drafts of a sequence by the outputs of `verify`, and take those that stand and one token more."""
        verdict = judge(drafts, sequence.choices(drafts, outputs["logits"]), sequence.generator)
        sequence.pending = 1 + verdict.accepted
        sequence.hidden = outputs["hidden"][verdict.accepted]
        taken = 0
        tokens = (*(draft.token for draft in drafts[: verdict.accepted]), verdict.following)
        for token, logits in zip(tokens, outputs["logits"], strict=False):
            if sequence.ending is None:
                self._take(sequence, token, logits)
                taken += 1
        self._count(taken)

    def _draw(self, sequence: Running, logits: Array) -> None:
        token = sequence.choice(logits, sequence.guide).draw(sequence.generator)
        if sequence.ending is None:
            self._take(sequence, token, logits)

    def _take(self, sequence: Running, token: int, logits: Array) -> None:
        logprobs = sequence.logprobs(logits, token)
        text = sequence.take(token, self.capacity.context_length)
        self._taken.append(Taken(sequence, token, text, logprobs))

    def _count(self, tokens: int) -> None:
        self.rounds += 1
        self.decoded += tokens

    def _keep(self, row: int, tokens: int) -> None:
        """Keep the states of a sequence at `tokens` tokens, where they are now."""
        sequence = self.rows[row]
        assert self.cache is not None
        parent = sequence.cached
        if parent is not None and self.cache.holds(parent) and tokens > parent.tokens:
            snapshot = self.engine.snapshot(row, parent.tokens, tokens)
            sequence.cached = self.cache.keep(parent, sequence.tokens, tokens, snapshot)

    def _leave(self) -> None:
        """Take sequences that have ended out; the last ones come into their rows."""
        for row in reversed(range(len(self.rows))):
            sequence = self.rows[row]
            if sequence.ending is None:
                continue
            if self.cache is not None and sequence.held and sequence.failure is None:
                self._keep(row, sequence.held)
            last = len(self.rows) - 1
            if row != last:
                moved = self.rows[last]
                self.engine.restore(row, self.engine.snapshot(last, 0, len(moved.tokens)))
                self.rows[row] = moved
            self._suspended.pop(row, None)
            if last in self._suspended:
                self._suspended[row] = self._suspended.pop(last)
            self.rows.pop()

    def _lengths(self) -> Array:
        """Return the tokens that the states of each row hold, with those that the next `verify` commits."""
        lengths = self._zeros()
        for row, sequence in enumerate(self.rows):
            lengths[row] = sequence.committed if sequence.is_read else sequence.read
        return lengths

    @property
    def _size(self) -> int:
        """The smallest batch size that holds the sequences."""
        return next(size for size in self.engine.batch_sizes if size >= len(self.rows))

    def _zeros(self, *dims: int) -> Array:
        return np.zeros((self._size, *dims), np.int64)
