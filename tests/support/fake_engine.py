"""An engine whose model is any function of the tokens so far, and which checks what generation tells it.

It keeps whole sequences instead of states, by the rules of the contract: prefill commits the counted tokens, verify
commits what the last verdict accepted of its predecessor's tokens. Lengths that differ from what is committed fail.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.runtime.engines.interface import Allocation, Array, Port, Signature

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


class FakeEngine:
    """`model` gives the logits of the main model, `drafts` those of its drafter."""

    def __init__(
        self, model: Logits, *, batch: int = 1, chunk: int = 4, draft_tokens: int = 2, drafts: Logits | None = None
    ) -> None:
        self.batch = batch
        self.model, self.drafts = model, drafts if drafts is not None else model
        self.calls: list[str] = []
        self.committed: list[list[int]] = [[] for _ in range(batch)]
        self.pending: list[list[int]] = [[] for _ in range(batch)]
        self.cache: list[dict[int, tuple[int, int]]] = [{} for _ in range(batch)]
        """Of the drafter: position → the token there (from the hidden state) and the one behind it."""
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
            self.committed[row], self.pending[row], self.cache[row] = [], [], {}

    def replace_weights(self, checkpoint: Checkpoint) -> None:
        raise NotImplementedError

    def allocated(self) -> Allocation:
        return Allocation(0, 0, 0)

    def run(self, entry: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.calls.append(entry)
        assert set(inputs) == set(self.signatures[entry].inputs)
        for name, port in self.signatures[entry].inputs.items():
            assert inputs[name].shape == port.shape, (entry, name)
        rows = [
            getattr(self, f"_{entry}")(b, {name: value[b] for name, value in inputs.items()}) for b in range(self.batch)
        ]
        return {name: np.stack([row[i] for row in rows]).astype(np.float32) for i, name in enumerate(OUTPUTS[entry])}

    def _prefill(self, b: int, given: Mapping[str, Array]) -> tuple[Array, ...]:
        count, length = int(given["counts"]), int(given["lengths"])
        if count == 0:
            return np.zeros((1, self._size)), np.zeros((1, WIDTH))
        assert length == len(self.committed[b])
        self.committed[b] += [int(token) for token in given["input_ids"][:count]]
        for i in range(count):
            self.cache[b][length + i] = (int(given["input_ids"][i]), int(given["following_ids"][i]))
        return self.model(self.committed[b])[None], self._hidden(b, len(self.committed[b]) - 1)[None]

    def _decode(self, b: int, given: Mapping[str, Array]) -> tuple[Array, ...]:
        if given["lengths"] == 0:
            return (np.zeros((1, self._size)),)
        assert given["lengths"] == len(self.committed[b])
        self.committed[b].append(int(given["input_ids"][0]))
        return (self.model(self.committed[b])[None],)

    def _verify(self, b: int, given: Mapping[str, Array]) -> tuple[Array, ...]:
        ids, length = [int(token) for token in given["input_ids"]], int(given["lengths"])
        if length == 0:
            return np.zeros((len(ids), self._size)), np.zeros((len(ids), WIDTH))
        self.committed[b] += self.pending[b][: int(given["accepted"])]
        assert length == len(self.committed[b]), "a state would be read too early or too late"
        self.pending[b] = ids
        for i, following in enumerate(given["following_ids"]):
            self.cache[b][length + i] = (ids[i], int(following))
        prefixes = [self.committed[b] + ids[: i + 1] for i in range(len(ids))]
        hidden = [np.array([length + i + 1, token], np.float32) for i, token in enumerate(ids)]
        return np.stack([self.model(prefix) for prefix in prefixes]), np.stack(hidden)

    def _draft(self, b: int, given: Mapping[str, Array]) -> tuple[Array, ...]:
        token, length = int(given["input_ids"][0]), int(given["lengths"])
        if not given["hidden"].any():
            return np.zeros((1, self._size)), np.zeros((1, WIDTH))
        position, before = (int(x) for x in given["hidden"][0])
        assert position == length + 1, "the hidden state is that of another position"
        self.cache[b][length] = (before, token)
        read = [self.cache[b][p] for p in range(length + 1)]  # every position is there, and they fit together
        assert all(read[p][1] == read[p + 1][0] for p in range(length)), "an entry of a rejected draft is read"
        return self.drafts([*(first for first, _ in read), token])[None], np.array([[length + 2, token]], np.float32)

    def _hidden(self, b: int, position: int) -> Array:
        return np.array([position + 1, self.committed[b][position]], np.float32)

    @property
    def _size(self) -> int:
        return len(self.model([0]))


def table(vocab_size: int, seed: int = 0, scale: float = 1.5) -> Logits:
    """Return a model whose logits depend on the last two tokens and on nothing else: distributions are known."""
    logits = np.random.default_rng(seed).normal(size=(vocab_size, vocab_size, vocab_size)) * scale
    return lambda tokens: logits[tokens[-2] if len(tokens) > 1 else 0, tokens[-1]].astype(np.float32)
