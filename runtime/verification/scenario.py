"""Scenarios, which every implementation runs: a prompt in chunks, then decoded tokens, or drafts to verify.

Sequences of a batch have the same length here, since a PyTorch module has no padding; the tests of the entry
points are about ragged batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from n3c.ir.program import Program
from n3c.runtime.engines.interface import Array
from n3c.specs.schema import Spec

PROMPT = 24
"""Most tokens of a prompt, so that small models need seconds."""


@dataclass(frozen=True, slots=True)
class Step:
    """One call. `tokens` [B, n] are what it takes, after `position` tokens of each sequence."""

    entry: str
    position: int
    tokens: Array
    following: Array
    """[B, n]: the token after each of `tokens`; 0 where a runtime would not know it yet."""
    commits: int
    """How many of `tokens` stay; those after are wrong on purpose."""
    accepted: int = 0
    """Tokens of the `verify` before that this one commits first."""

    @property
    def title(self) -> str:
        """The step in words."""
        return f"{self.entry} behind {self.position} tokens"


def scenarios(spec: Spec, program: Program, batch: int, seed: int) -> list[list[Step]]:
    """Return what to run, each from fresh states.

    Decoding and verification stand once by themselves, where nothing but weights is quantized, and once after a
    prompt.
    """
    capacity = spec.serving.max_seq_len
    drafts = spec.serving.draft_tokens if {"draft", "verify"} <= set(program.entry_points) else None
    longest = 3 * (1 + drafts) + 1 if drafts is not None else 4
    prompt = max(1, min(PROMPT, capacity - longest))
    ids = np.random.default_rng(seed).integers(0, spec.model.vocab_size, (batch, prompt + longest + 1))
    chunk = spec.serving.prefill_chunk
    prefill = [_step(ids, "prefill", at, at, min(chunk, prompt - at), prompt) for at in range(0, prompt, chunk)]
    made = [_decoded(ids, 0, min(4, capacity)), [*prefill, *_decoded(ids, prompt, min(2, capacity - prompt))]]
    if drafts is not None and longest <= capacity:
        made.append(_verified(ids, 0, drafts, spec.model.vocab_size))
    if drafts is not None and prompt + longest <= capacity:
        made.append([*prefill, *_verified(ids, prompt, drafts, spec.model.vocab_size)])
    return made


def _step(ids: Array, entry: str, position: int, first: int, count: int, known: int = 0) -> Step:
    """Return a step that takes `count` of `ids` from `first` on, of which those below `known` are known before."""
    following = ids[:, first + 1 : first + 1 + count].copy()
    following[:, max(0, known - first - 1) :] = 0
    return Step(entry, position, ids[:, first : first + count], following, count)


def _decoded(ids: Array, start: int, count: int) -> list[Step]:
    return [_step(ids, "decode", at, at, 1) for at in range(start, start + count)]


def _verified(ids: Array, start: int, drafts: int, vocab_size: int) -> list[Step]:
    """Return three rounds: all drafts accepted, none, some. A draft call before each completes the drafter's cache."""
    at, accepted, steps = start, 0, list[Step]()
    for commits in (1 + drafts, 1, 1 + drafts // 2):
        if at:
            steps.append(_step(ids, "draft", at - 1, at, 1))
        tokens = ids[:, at : at + 1 + drafts].copy()
        tokens[:, commits:] = (tokens[:, commits:] + 1) % vocab_size
        following = np.pad(tokens[:, 1:], ((0, 0), (0, 1)))
        steps.append(Step("verify", at, tokens, following, commits, accepted))
        at, accepted = at + commits, commits
    return [*steps, _step(ids, "draft", at - 1, at, 1)]
