"""Sampling a token from logits: greedy, temperature, top-k, top-p."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError
from n3c.runtime.numbers import require_number

from .distribution import Distribution, Tokens, certain

FEW = (64, 2048)
"""Tokens that top-p looks at first: nearly always they hold its probability, and nothing else is sorted."""
BLOCK = 64
"""Logits of which only the best is looked at when the likeliest tokens are sought."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy: the likeliest token, the first of equals."""

    temperature: float = 0.0
    top_k: int = 0
    """Keep the k likeliest; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest tokens whose probabilities sum to at least this (Holtzman et al., arXiv 1904.09751)."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise N3CError (E0816, exit code 2) for a number that is out of its range or not finite."""
        require_number("temperature", self.temperature, least=0)
        require_number("top_k", self.top_k, least=0)
        require_number("top_p", self.top_p, above=0, most=1)
        require_number("seed", self.seed, least=0)

    def generator(self, sequence: int) -> np.random.Generator:
        """Return the random numbers of one sequence: they depend on no other sequence of the batch."""
        return np.random.default_rng((self.seed, sequence))


def distribution(logits: NDArray[Any], sampling: Sampling) -> Distribution:
    """Return what `sampling` draws from, given logits [V]: softmax(logits / temperature), cut by top-k, then top-p.

    Greedy is a distribution too, all on one token, so that speculative decoding needs one rule only.
    Raises N3CError (exit code 5) where a logit is not finite.
    """
    best = float(logits.max())  # NaN where a logit is
    if not np.isfinite(best) or not np.isfinite(logits.min()):
        help_ = "are these the weights of this spec? `n3c verify` names the first layer that differs"
        raise N3CError(Diagnostic("E0806", "the model's logits are not finite", help=help_), ExitCode.NUMERICS)
    if sampling.temperature == 0:
        return certain(int(logits.argmax()))
    temperature = np.float32(max(sampling.temperature, float(np.finfo(np.float32).tiny)))
    if 0 < sampling.top_k < len(logits):
        kept = likeliest(logits, sampling.top_k)
        weights = _weights(logits[kept], best, temperature)
        if sampling.top_p < 1:
            few = _reaching(weights, sampling.top_p * weights.sum(dtype=np.float64))
            first = likeliest(logits[kept], few)
            kept, weights = kept[first], weights[first]
    else:
        weights = _weights(logits, best, temperature)
        total = weights.sum(dtype=np.float64)
        if sampling.top_p == 1:
            weights /= np.float32(total)
            return Distribution(None, weights)
        kept = _nucleus(logits, weights, sampling.top_p * total)
        weights = weights[kept]
    return Distribution(kept, weights / weights.sum(dtype=np.float64))


def likeliest(logits: NDArray[Any], count: int) -> Tokens:
    """Return the `count` tokens [count] of the largest logits [V], ascending; of equal logits the first are taken."""
    if count >= len(logits):
        return np.arange(len(logits))
    blocks = len(logits) // BLOCK
    candidates: NDArray[Any] = logits
    if count < blocks:
        # `count` blocks hold a logit of at least `bound`, so none of the likeliest is below it
        maxima = logits[: blocks * BLOCK].reshape(blocks, BLOCK).max(axis=1)
        bound = np.partition(maxima, blocks - count)[blocks - count]
        candidates = logits[logits >= bound]
    last = np.partition(candidates, len(candidates) - count)[len(candidates) - count]
    tokens = np.flatnonzero(logits >= last)
    if len(tokens) > count:
        equal = np.flatnonzero(logits[tokens] == last)
        tokens = np.delete(tokens, equal[count - len(tokens) :])
    return tokens


def _weights(logits: NDArray[Any], best: float, temperature: np.float32) -> NDArray[np.float32]:
    """Return exp((logits - best) / temperature)."""
    scaled = logits.astype(np.float32)
    scaled -= np.float32(best)
    with np.errstate(over="ignore"):  # of a temperature near 0: minus infinity, whose weight is 0
        scaled /= temperature
    return np.exp(scaled, out=scaled)


def _nucleus(logits: NDArray[Any], weights: NDArray[np.float32], mass: float) -> Tokens:
    """Return the fewest of the likeliest tokens whose weights sum to at least `mass`, ascending."""
    for count in FEW:
        tokens = likeliest(logits, count)
        few = _reaching(weights[tokens], mass)
        if few <= len(tokens):
            return tokens[likeliest(logits[tokens], few)]
    return likeliest(logits, _reaching(weights, mass))


def _reaching(weights: NDArray[np.float32], mass: float) -> int:
    """Return how many of the largest `weights` sum to at least `mass`; one more than there are where all do not."""
    descending = np.sort(weights)[::-1]
    return int(np.searchsorted(np.cumsum(descending, dtype=np.float64), mass)) + 1
