"""A distribution over the vocabulary that costs as much as the tokens that may be drawn, not as the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]
Weights = NDArray[np.floating[Any]]

BLOCK = 512
"""Weights that are summed before a draw looks at them one by one."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """Tokens that may be drawn, and their probabilities; every other token has probability 0."""

    tokens: Tokens | None
    """[K], ascending; None: the whole vocabulary."""
    probabilities: Weights
    """[K], or [V]; in proportion to them tokens are drawn."""

    def probability(self, token: int) -> float:
        """Return the probability of a token."""
        if self.tokens is None:
            return float(self.probabilities[token])
        place = int(np.searchsorted(self.tokens, token))
        return float(self.probabilities[place]) if place < len(self.tokens) and self.tokens[place] == token else 0.0

    def draw(self, generator: np.random.Generator) -> int:
        """Draw a token, by one random number."""
        if self.tokens is not None and len(self.tokens) == 1:
            generator.random()
            return int(self.tokens[0])
        starts = np.arange(0, len(self.probabilities), BLOCK)
        blocks = np.add.reduceat(self.probabilities, starts, dtype=np.float64)
        block, rest = _place(blocks, generator.random() * float(blocks.sum()))
        start = block * BLOCK
        place = start + _place(self.probabilities[start : start + BLOCK], rest)[0]
        return place if self.tokens is None else int(self.tokens[place])

    def excess(self, other: Distribution) -> Distribution | None:
        """Return what is drawn from where `other`'s draft was rejected, max(p − q, 0); None where that is nothing.

        It is in proportion to probabilities, whose sum is not 1.
        """
        excess = np.maximum(self.probabilities - other._over(self.tokens, len(self.probabilities)), 0)
        return Distribution(self.tokens, excess) if excess.any() else None

    def dense(self, vocabulary: int) -> NDArray[np.float64]:
        """Return the probabilities of all tokens, [V]."""
        return self._over(None, vocabulary).astype(np.float64)

    def _over(self, tokens: Tokens | None, size: int) -> Weights:
        """Return the probabilities of `tokens`, or of all of a vocabulary of `size`."""
        if self.tokens is None:
            return self.probabilities if tokens is None else self.probabilities[tokens]
        if tokens is None:
            every = np.zeros(size, self.probabilities.dtype)
            every[self.tokens] = self.probabilities
            return every
        places = np.minimum(np.searchsorted(self.tokens, tokens), len(self.tokens) - 1)
        return np.where(self.tokens[places] == tokens, self.probabilities[places], 0)


def certain(token: int) -> Distribution:
    """Return the distribution that is all on `token`."""
    return Distribution(np.array([token]), np.ones(1))


def _place(weights: Weights, target: float) -> tuple[int, float]:
    """Return the index at which the running sum of `weights` passes `target`, and how far into it `target` lies."""
    mass = np.cumsum(weights, dtype=np.float64)
    last = int(np.flatnonzero(weights)[-1])
    index = min(int(np.searchsorted(mass, target, side="right")), last)  # rounding may lead past the last weight
    return index, target - (float(mass[index - 1]) if index else 0.0)
