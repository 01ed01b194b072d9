"""An engine whose model is any function of the tokens so far, and which checks what generation tells it.

It keeps whole sequences instead of states, by the rules of the contract: prefill commits the counted tokens, verify
commits what the last verdict accepted of its predecessor's tokens. Lengths that differ from what is committed fail, and
so does reading a place of a cache that holds another token. As in a real engine, a call moves on every row that it has,
and may lose the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.runtime.engines.interface import Allocation, Array, Port, Signature, Snapshot

Logits = Callable[[Sequence[int]], npt.NDArray[np.float32]]
"""Logits [V] behind a sequence of tokens."""
WIDTH = 2
"""Of hidden states: one more than the position, and the token there; zeros are of no sequence."""
OUTPUTS = {
    "prefill": ("logits", "hidden"),
    "decode": ("logits",),
    "verify": ("logits", "hidden"),
    "draft": ("logits", "next_hidden"),
}


@dataclass
class Row:
    """The states of a sequence: what was committed, what waits for a verdict, and what the caches hold, by place."""

    committed: list[int] = field(default_factory=list[int])
    pending: list[int] = field(default_factory=list[int])
    keys: dict[int, int] = field(default_factory=dict[int, int])
    """Of the main model: position → the token there."""
    cache: dict[int, tuple[int, int]] = field(default_factory=dict[int, tuple[int, int]])
    """Of the drafter: position → the token there (from the hidden state) and the one behind it."""

    @property
    def bytes(self) -> int:
        """Of a kept copy."""
        return 8 * (len(self.committed) + len(self.pending) + len(self.keys) + 2 * len(self.cache))

    def copied(self, places: range) -> Row:
        """Return a copy with some places of the caches."""
        kept = {position: token for position, token in self.keys.items() if position in places}
        drafted = {position: entry for position, entry in self.cache.items() if position in places}
        return Row(list(self.committed), list(self.pending), kept, drafted)


class FakeEngine:
    """`model` gives the logits of the main model, `drafts` those of its drafter."""

    def __init__(
        self,
        model: Logits,
        *,
        batch: int = 1,
        batch_sizes: Sequence[int] = (),
        chunk: int = 4,
        draft_tokens: int = 2,
        drafts: Logits | None = None,
    ) -> None:
        self.batch_sizes = sorted(batch_sizes or [batch])
        self.batch = batch = self.batch_sizes[-1]
        self.model, self.drafts = model, drafts if drafts is not None else model
        self.calls: list[str] = []
        self.sizes: list[int] = []
        """Of the calls."""
        self.rows = [Row() for _ in range(batch)]
        lengths, ids, tokens = Port("i64", (batch,)), Port("i64", (batch, 1)), Port("i64", (batch, draft_tokens + 1))
        chunks, hidden = Port("i64", (batch, chunk)), Port("f32", (batch, 1, WIDTH))
        prefill = {"input_ids": chunks, "counts": lengths, "lengths": lengths, "following_ids": chunks}
        verify = {"input_ids": tokens, "following_ids": tokens, "lengths": lengths, "accepted": lengths}
        self.signatures: Mapping[str, Signature] = {
            "prefill": Signature(prefill, {}),
            "decode": Signature({"input_ids": ids, "lengths": lengths}, {}),
            "verify": Signature(verify, {}),
            "draft": Signature({"input_ids": ids, "hidden": hidden, "lengths": lengths}, {}),
        }

    def reset(self, sequences: Sequence[int] | None = None) -> None:
        for row in range(self.batch) if sequences is None else sequences:
            self.rows[row] = Row()

    def snapshot(self, row: int, start: int, stop: int) -> Row:
        return self.rows[row].copied(range(start, stop))

    def restore(self, row: int, snapshot: Snapshot) -> None:
        assert isinstance(snapshot, Row)
        kept = self.rows[row]
        self.rows[row] = Row(
            list(snapshot.committed),
            list(snapshot.pending),
            {**kept.keys, **snapshot.keys},
            {**kept.cache, **snapshot.cache},
        )

    def replace_weights(self, checkpoint: Checkpoint) -> None:
        raise NotImplementedError

    def allocated(self) -> Allocation:
        return Allocation(0, 0, 0)

    def run(self, entry: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        count = len(inputs["input_ids"])
        assert count in self.batch_sizes
        self.calls.append(entry)
        self.sizes.append(count)
        assert set(inputs) == set(self.signatures[entry].inputs)
        for name, port in self.signatures[entry].inputs.items():
            assert inputs[name].shape == (count, *port.shape[1:]), (entry, name)
        run = getattr(self, f"_{entry}")
        rows = [run(self.rows[b], {name: value[b] for name, value in inputs.items()}) for b in range(count)]
        self.rows[count:] = [Row([-1]) for _ in self.rows[count:]]  # an engine may lose them
        return {name: np.stack([row[i] for row in rows]).astype(np.float32) for i, name in enumerate(OUTPUTS[entry])}

    def _prefill(self, row: Row, given: Mapping[str, Array]) -> tuple[Array, ...]:
        count, length = int(given["counts"]), int(given["lengths"])
        if count == 0:
            return np.zeros((1, self._size)), np.zeros((1, WIDTH))
        assert length == len(row.committed)
        self._commit(row, [int(token) for token in given["input_ids"][:count]])
        for i in range(count):
            row.cache[length + i] = (int(given["input_ids"][i]), int(given["following_ids"][i]))
        self._require_keys(row)
        return self.model(row.committed)[None], self._hidden(row)[None]

    def _decode(self, row: Row, given: Mapping[str, Array]) -> tuple[Array, ...]:
        """Whatever the row is, its states move on; only one that is where the call says gives logits."""
        running = given["lengths"] == len(row.committed) and given["lengths"] > 0
        row.keys[int(given["lengths"])] = token = int(given["input_ids"][0])
        row.committed.append(token)
        if not running:
            return (np.zeros((1, self._size)),)
        self._require_keys(row)
        return (self.model(row.committed)[None],)

    def _verify(self, row: Row, given: Mapping[str, Array]) -> tuple[Array, ...]:
        ids, length = [int(token) for token in given["input_ids"]], int(given["lengths"])
        self._commit(row, row.pending[: int(given["accepted"])])
        row.pending = ids
        for i, following in enumerate(given["following_ids"]):
            row.keys[length + i], row.cache[length + i] = ids[i], (ids[i], int(following))
        if length == 0:
            return np.zeros((len(ids), self._size)), np.zeros((len(ids), WIDTH))
        assert length == len(row.committed), "a state would be read too early or too late"
        self._require_keys(row)
        prefixes = [row.committed + ids[: i + 1] for i in range(len(ids))]
        hidden = [np.array([length + i + 1, token], np.float32) for i, token in enumerate(ids)]
        return np.stack([self.model(prefix) for prefix in prefixes]), np.stack(hidden)

    def _draft(self, row: Row, given: Mapping[str, Array]) -> tuple[Array, ...]:
        token, length = int(given["input_ids"][0]), int(given["lengths"])
        if not given["hidden"].any():
            row.cache[length] = (0, token)
            return np.zeros((1, self._size)), np.zeros((1, WIDTH))
        position, before = (int(x) for x in given["hidden"][0])
        assert position == length + 1, "the hidden state is that of another position"
        row.cache[length] = (before, token)
        read = [row.cache[p] for p in range(length + 1)]  # every position is there, and they fit together
        assert all(read[p][1] == read[p + 1][0] for p in range(length)), "an entry of a rejected draft is read"
        return self.drafts([*(first for first, _ in read), token])[None], np.array([[length + 2, token]], np.float32)

    def _commit(self, row: Row, tokens: Sequence[int]) -> None:
        for token in tokens:
            row.keys[len(row.committed)] = token
            row.committed.append(token)

    def _require_keys(self, row: Row) -> None:
        held = [row.keys.get(position) for position in range(len(row.committed))]
        assert held == row.committed, "the caches hold other tokens than the states"

    def _hidden(self, row: Row) -> Array:
        return np.array([len(row.committed), row.committed[-1]], np.float32)

    @property
    def _size(self) -> int:
        return len(self.model([0]))


def table(vocab_size: int, seed: int = 0, scale: float = 1.5) -> Logits:
    """Return a model whose logits depend on the last two tokens and on nothing else: distributions are known."""
    logits = np.random.default_rng(seed).normal(size=(vocab_size, vocab_size, vocab_size)) * scale
    return lambda tokens: logits[tokens[-2] if len(tokens) > 1 else 0, tokens[-1]].astype(np.float32)
