"""Drafters whose drafts are known to be right or wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from n3c.runtime.engines.interface import Array, Engine
from n3c.runtime.generation.distribution import certain
from n3c.runtime.generation.sequence import Running
from n3c.runtime.generation.speculative import Draft


class Oracle:
    """Knows what follows, and drafts it, or something else, or each of both by chance."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        following: Sequence[Sequence[int]],
        kind: Literal["right", "wrong", "random"],
        vocab_size: int,
    ) -> None:
        self.following = {tuple(prompt): tokens for prompt, tokens in zip(prompts, following, strict=True)}
        self.kind, self.vocab_size, self.random = kind, vocab_size, np.random.default_rng(4)

    def propose(
        self, engine: Engine, sequences: Sequence[Running | None], lengths: Array, count: int
    ) -> list[list[Draft]]:
        return [self._drafts(s, count) if s is not None else [] for s in sequences]

    def _drafts(self, sequence: Running, count: int) -> list[Draft]:
        done = len(sequence.new)
        known = [*self.following[sequence.prompt][done : done + count], *[0] * count][:count]
        drafts: list[Draft] = []
        for right in known:
            wrong = self.kind == "wrong" or (self.kind == "random" and self.random.random() < 0.4)
            token = (right + 1 + int(self.random.integers(self.vocab_size - 1))) % self.vocab_size if wrong else right
            drafts.append(Draft(token, certain(token)))
        return drafts
