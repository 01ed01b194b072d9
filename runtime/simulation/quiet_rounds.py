"""Rounds in which nobody joins, reads or ends: what they do is known, so they are added up and not run.

Most rounds are such. The clock, the sequences and the random numbers of drafts move on as they do in rounds that are
run; a test compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from n3c.runtime.generation.batch import Batch
from n3c.runtime.generation.sequence import Running

from .engine import SimulatedEngine


@dataclass(frozen=True, slots=True)
class Quiet:
    """Rounds that were added up."""

    rounds: int
    tokens: Sequence[int]
    """That each row got."""


def pass_quiet_rounds(batch: Batch, engine: SimulatedEngine, until: float) -> Quiet | None:
    """Do the next rounds of `batch` that end no sequence and are over before `until`; None where there are none.

    No sequence may be about to join.
    """
    rows, context = batch.rows, batch.capacity.context_length
    if not rows or any(not each.is_read or each.committed < 2 for each in rows):
        return None
    ends = [min(_last(each), context) for each in rows]
    before = [len(each.tokens) for each in rows]
    rounds = _decode(rows, ends, engine, until) if batch.drafter is None else _speculate(rows, ends, engine, until)
    if not rounds:
        return None
    tokens = [len(each.tokens) - length for each, length in zip(rows, before, strict=True)]
    batch.rounds += rounds * len(rows)
    batch.decoded += sum(tokens)
    return Quiet(rounds, tokens)


def _last(sequence: Running) -> int:
    """Return how many tokens a sequence has at its end."""
    return len(sequence.prompt) - sequence.answered + sequence.options.max_new_tokens


def _decode(rows: Sequence[Running], ends: Sequence[int], engine: SimulatedEngine, until: float) -> int:
    size, fed, times, clock = engine.size_for(len(rows)), len(rows), engine.times, engine.clock
    longest = max(each.committed for each in rows)
    most = min(end - 1 - len(each.tokens) for each, end in zip(rows, ends, strict=True))
    drawing, rounds = fed * times.draw(), 0
    while rounds < most:
        seconds = times.call("decode", size, longest + rounds + 1, fed)
        if clock.now + seconds + drawing >= until:
            break
        engine.spend(seconds)
        clock.now += drawing
        rounds += 1
    for each in rows:
        each.tokens.extend([1] * rounds)
        each.held = each.committed
    return rounds


def _speculate(rows: Sequence[Running], ends: Sequence[int], engine: SimulatedEngine, until: float) -> int:
    size, fed, times, clock = engine.size_for(len(rows)), len(rows), engine.times, engine.clock
    drafts, draw, rounds = engine.plan.draft_tokens, times.draw(), 0
    longest = max(each.committed for each in rows)
    while True:
        accepted = [stand.index(False) if False in stand else drafts for stand in engine.standing(size)[:fed]]
        if any(len(each.tokens) + 1 + kept >= end for each, kept, end in zip(rows, accepted, ends, strict=True)):
            return rounds
        seconds = sum(times.call("draft", size, longest + step, fed) for step in range(drafts))
        seconds += times.call("verify", size, longest + 1 + drafts, fed)
        drawing = (fed * (drafts + 1) + sum(accepted)) * draw
        if clock.now + seconds + drawing >= until:
            return rounds
        engine.standing_taken()
        engine.spend(seconds)
        clock.now += drawing
        rounds += 1
        for each, kept in zip(rows, accepted, strict=True):
            each.held, each.pending = each.committed, 1 + kept
            each.tokens += [1] * kept + [int(kept == drafts)]
            longest = max(longest, each.committed)
