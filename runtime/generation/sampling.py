"""Sampling a token from logits: what changes them, and what of their distribution is cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
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
    min_p: float = 0.0
    """Keep the tokens of at least this part of the likeliest one's probability (Nguyen et al., arXiv 2407.01082)."""
    presence_penalty: float = 0.0
    """Taken from the logit of a token that was generated before."""
    frequency_penalty: float = 0.0
    """Taken from the logit of a token for each time that it was generated before."""
    repetition_penalty: float = 1.0
    """Divides a positive logit of a token of the prompt or generated before, multiplies a negative one (Keskar et al.,
    arXiv 1909.05858)."""
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    """Token → what is added to its logit."""

    def __post_init__(self) -> None:
        """Raise N3CError (E0816, exit code 2) for a number that is out of its range or not finite."""
        require_number("temperature", self.temperature, least=0)
        require_number("top_k", self.top_k, least=0)
        require_number("top_p", self.top_p, above=0, most=1)
        require_number("seed", self.seed, least=0)
        require_number("min_p", self.min_p, least=0, most=1)
        require_number("presence_penalty", self.presence_penalty, least=-2, most=2)
        require_number("frequency_penalty", self.frequency_penalty, least=-2, most=2)
        require_number("repetition_penalty", self.repetition_penalty, above=0, most=10)
        for token, bias in self.logit_bias.items():
            require_number("logit_bias", token, least=0)
            require_number("logit_bias", bias, least=-100, most=100)

    @property
    def penalizes(self) -> bool:
        """Whether the tokens before change the logits."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)

    def generator(self, sequence: int) -> np.random.Generator:
        """Return the random numbers of one sequence: they depend on no other sequence of the batch."""
        return np.random.default_rng((self.seed, sequence))


def require_finite(logits: NDArray[Any]) -> None:
    """Raise N3CError (E0806, exit code 5) where a logit of the model is not finite."""
    if not np.isfinite(logits.max()) or not np.isfinite(logits.min()):  # both are NaN where a logit is
        help_ = "are these the weights of this spec? `n3c verify` names the first layer that differs"
        raise N3CError(Diagnostic("E0806", "the model's logits are not finite", help=help_), ExitCode.NUMERICS)


def distribution(logits: NDArray[Any], sampling: Sampling) -> Distribution:
    """Return what `sampling` draws from, given logits [V]: softmax(logits / temperature), cut by top-k, top-p, min-p.

    Greedy is a distribution too, all on one token, so that speculative decoding needs one rule only. Minus infinity is
    the logit of a token that is never drawn; one at least is finite.
    """
    if sampling.temperature == 0:
        return certain(int(logits.argmax()))
    kept, weights = _cut(logits, sampling)
    if sampling.min_p > 0:
        likely = np.flatnonzero(weights >= np.float32(sampling.min_p))
        kept, weights = likely if kept is None else kept[likely], weights[likely]
    total = _sum(weights)
    if kept is None:
        weights /= np.float32(total)
        return Distribution(None, weights)
    return Distribution(kept, weights / total)


def _cut(logits: NDArray[Any], sampling: Sampling) -> tuple[Tokens | None, NDArray[np.float32]]:
    """Return the tokens that top-k and top-p keep, None for all, and weights in proportion to their probabilities.

    The likeliest token's weight is 1.
    """
    best = float(logits.max())
    temperature = np.float32(max(sampling.temperature, float(np.finfo(np.float32).tiny)))
    if 0 < sampling.top_k < len(logits):
        kept = likeliest(logits, sampling.top_k)
        weights = _weights(logits[kept], best, temperature)
        if sampling.top_p < 1:
            few = _reaching(weights, sampling.top_p * weights.sum(dtype=np.float64))
            first = likeliest(logits[kept], few)
            kept, weights = kept[first], weights[first]
        return kept, weights
    weights = _weights(logits, best, temperature)
    if sampling.top_p == 1:
        return None, weights
    kept = _nucleus(logits, weights, sampling.top_p * _sum(weights))
    return kept, weights[kept]


def likeliest(logits: NDArray[Any], count: int) -> Tokens:
    """Return the `count` tokens [count] of the largest logits [V], ascending; of equal logits the first are taken."""
    if count >= len(logits):
        return np.arange(len(logits))
    blocks = len(logits) // BLOCK
    candidates: NDArray[Any] = logits
    places: Tokens | None = None
    if count < blocks:
        # `count` blocks hold a logit of at least `bound`, so none of the likeliest is below it. A block is every
        # `blocks`th logit: their maxima are found for many blocks at once, of neighbours for one after the other
        maxima = logits[: blocks * BLOCK].reshape(BLOCK, blocks).max(axis=0)
        bound = np.partition(maxima, blocks - count)[blocks - count]
        places = np.flatnonzero(logits >= bound)
        candidates = logits[places]
    last = np.partition(candidates, len(candidates) - count)[len(candidates) - count]
    tokens = np.flatnonzero(candidates >= last)
    tokens = tokens if places is None else places[tokens]
    if len(tokens) > count:
        equal = np.flatnonzero(logits[tokens] == last)
        tokens = np.delete(tokens, equal[count - len(tokens) :])
    return tokens


def _weights(logits: NDArray[Any], best: float, temperature: np.float32) -> NDArray[np.float32]:
    """Return exp((logits - best) / temperature)."""
    scaled: NDArray[np.float32] = np.subtract(logits, np.float32(best), dtype=np.float32)
    if temperature != 1:
        with np.errstate(over="ignore"):  # of a temperature near 0: minus infinity, whose weight is 0
            scaled /= temperature
    np.exp(scaled, out=scaled)
    return scaled


def _sum(weights: NDArray[np.float32]) -> float:
    """Return the sum, exact to some 2^-23 of it: eight weights are added in float32, their sums in float64."""
    few = len(weights) % 8
    eights = weights[few:].reshape(8, -1).sum(axis=0)
    return float(eights.sum(dtype=np.float64) + weights[:few].sum(dtype=np.float64))


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
