"""Sampling a token from logits: greedy, temperature, top-k, top-p."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError
from n3c.runtime.numbers import require_number

Probabilities = NDArray[np.float64]


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


def distribution(logits: NDArray[Any], sampling: Sampling) -> Probabilities:
    """Return the probabilities [V] that `sampling` draws from: softmax(logits / temperature), cut by top-k, then top-p.

    Greedy is a distribution too, all on one token, so that speculative decoding needs one rule only.
    Raises N3CError (exit code 5) where a logit is not finite.
    """
    if not np.isfinite(logits).all():
        help_ = "are these the weights of this spec? `n3c verify` names the first layer that differs"
        raise N3CError(Diagnostic("E0806", "the model's logits are not finite", help=help_), ExitCode.NUMERICS)
    if sampling.temperature == 0:
        return certain(int(np.argmax(logits)), len(logits))
    below_best = logits.astype(np.float64) - float(logits.max())
    with np.errstate(over="ignore"):  # of a temperature near 0: minus infinity, whose weight is 0
        weights = np.exp(below_best / sampling.temperature)
    if 0 < sampling.top_k < len(weights) or sampling.top_p < 1:
        order = np.argsort(-weights, kind="stable")
        kept = order[: sampling.top_k] if sampling.top_k else order
        if sampling.top_p < 1:
            mass = np.cumsum(weights[kept])
            below = np.count_nonzero(mass < sampling.top_p * float(mass[-1]))
            kept = kept[: below + 1]  # the next one reaches top_p
        cut = np.zeros_like(weights)
        cut[kept] = weights[kept]
        weights = cut
    total: float = weights.sum()
    return np.asarray(weights / total)


def certain(token: int, size: int) -> Probabilities:
    """Return the distribution [size] that is all on `token`."""
    probabilities = np.zeros(size)
    probabilities[token] = 1.0
    return probabilities


def draw(weights: Probabilities, generator: np.random.Generator) -> int:
    """Draw a token with probability in proportion to `weights` [V], which need not sum to 1."""
    mass = np.cumsum(weights)
    token = int(np.count_nonzero(mass <= generator.random() * float(mass[-1])))
    last = int(np.nonzero(weights)[0][-1])
    return min(token, last)  # rounding may lead past the last token of any weight
