"""An engine that computes nothing: calls move its clock, and drafts stand as often as it is told.

Its vocabulary has two tokens. A draft is always token 1; where it is to stand `verify` finds token 1 likeliest too, and
else token 0. So greedy speculation keeps and rejects as many drafts as a real drafter's, by the very rule of serving.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.passes.state_layout import StatePlan
from n3c.runtime.engines.interface import Allocation, Array, Port, Signature, Snapshot

from .call_times import CallTimes

VOCABULARY = 2


@dataclass(frozen=True, slots=True)
class Counted:
    """A copy of states of which only the size is known."""

    bytes: int


@dataclass(slots=True)
class VirtualClock:
    """The time of a simulated machine."""

    now: float = 0.0
    """Seconds."""


@dataclass(slots=True)
class SimulatedEngine:
    """Runs entry points in no time and counts what they would take."""

    plan: StatePlan
    batch_sizes: Sequence[int]
    chunk: int
    """Tokens that `prefill` takes at once."""
    times: CallTimes
    acceptance: float = 0.0
    """Probability with which a draft stands whose predecessors stand."""
    clock: VirtualClock = field(default_factory=VirtualClock)
    seed: int = 0
    busy: float = field(default=0.0, init=False)
    """Seconds of calls and copies, without the host's."""
    signatures: Mapping[str, Signature] = field(init=False)
    """The entry points of serving, `verify` and `draft` where the state plan has drafts."""
    _random: np.random.Generator = field(init=False)
    _standing: list[list[bool]] = field(default_factory=list[list[bool]], init=False)

    def __post_init__(self) -> None:
        self.batch_sizes = sorted(self.batch_sizes)
        self._random = np.random.default_rng(self.seed)
        self.signatures = _signatures(self.batch, self.chunk, self.plan.draft_tokens)

    @property
    def batch(self) -> int:
        """Sequences that it holds."""
        return self.batch_sizes[-1]

    def run(self, entry: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Move the clock by the call, and by the tokens that the host then draws or judges."""
        rows, tokens = inputs["input_ids"].shape
        fed = _fed(entry, inputs)
        self.spend(self.times.call(entry, *extent(entry, inputs), int(fed.sum())))
        likeliest = np.ones((rows, tokens if entry == "verify" else 1), np.int64)
        drawn = np.ones(rows, np.int64)
        if entry == "verify":
            likeliest[:, :-1] = self.standing(rows)
            self.standing_taken()
            drawn += likeliest[:, :-1].cumprod(axis=1).sum(axis=1)
        self.clock.now += int(drawn[fed].sum()) * self.times.draw()
        hidden = np.zeros((*likeliest.shape, 1), np.float32)  # whatever it is: only this engine reads it
        return {"logits": _LOGITS[likeliest], "hidden": hidden, "next_hidden": hidden}

    def reset(self, sequences: Sequence[int] | None = None) -> None:
        """Do nothing: there are no states."""

    def snapshot(self, row: int, start: int, stop: int) -> Counted:
        """Return the size of a copy of the recurrent states and of some places of the caches."""
        a_place = self.plan.kv_bytes_per_token + self.plan.mtp_kv_bytes_per_token
        fixed = self.plan.bytes_per_request + self.plan.pending_bytes
        copied = Counted(fixed + (stop - start) * a_place)
        self.spend(self.times.copy(copied.bytes))
        return copied

    def restore(self, row: int, snapshot: Snapshot) -> None:
        """Move the clock by the copy."""
        self.spend(self.times.copy(snapshot.bytes))

    def replace_weights(self, checkpoint: Checkpoint) -> None:
        """Do nothing: there are no weights."""

    def allocated(self) -> Allocation:
        """Return nothing but the states, as the plan lists them."""
        return Allocation(self.plan.total_bytes * self.batch, 0, 0)

    def spend(self, seconds: float) -> None:
        """Compute for so long."""
        self.clock.now += seconds
        self.busy += seconds

    def size_for(self, sequences: int) -> int:
        """Return the smallest batch size that holds so many."""
        return next(size for size in self.batch_sizes if size >= sequences)

    def standing(self, rows: int) -> list[list[bool]]:
        """Return whether each draft of the next `verify` stands where its predecessors do; the same until that ran."""
        missing = rows - len(self._standing)
        if missing > 0:
            drawn = self._random.random((missing, self.plan.draft_tokens)) < self.acceptance
            self._standing += drawn.tolist()
        return self._standing[:rows]

    def standing_taken(self) -> None:
        """Let the next `verify` be another."""
        self._standing = []


def _fed(entry: str, inputs: Mapping[str, Array]) -> Array:
    """Return BOOL [B]: the rows of a call that are sequences which it moves on."""
    return (inputs["counts"] if entry == "prefill" else inputs["lengths"]) > 0


def extent(entry: str, inputs: Mapping[str, Array]) -> tuple[int, int]:
    """Return the batch size of a call, and the tokens that its longest sequence attends to."""
    rows, tokens = inputs["input_ids"].shape
    return rows, int(inputs["lengths"][_fed(entry, inputs)].max(initial=0)) + tokens


_LOGITS = np.eye(VOCABULARY, dtype=np.float32)
"""Token → logits of which it is the likeliest."""


def _signatures(batch: int, chunk: int, drafts: int) -> dict[str, Signature]:
    row, token = Port("i64", (batch,)), Port("i64", (batch, 1))
    chunks, hidden = Port("i64", (batch, chunk)), Port("f32", (batch, 1, 1))
    prefill = {"input_ids": chunks, "following_ids": chunks, "counts": row, "lengths": row}
    found = {"prefill": Signature(prefill, {}), "decode": Signature({"input_ids": token, "lengths": row}, {})}
    if drafts:
        tokens = Port("i64", (batch, 1 + drafts))
        verify = {"input_ids": tokens, "following_ids": tokens, "lengths": row, "accepted": row}
        found["verify"] = Signature(verify, {})
        found["draft"] = Signature({"input_ids": token, "hidden": hidden, "lengths": row}, {})
    return found


def standing(length: float, drafts: int) -> float:
    """Return the probability p with which a draft stands, so that a round gives `length` tokens: 1 + p + … + p^drafts.

    `length` is from 1 to 1 + `drafts`.
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**i for i in range(drafts + 1)) < length else (low, middle)
    return (low + high) / 2 if length > 1 else 0.0
