"""Log-probabilities of tokens: of the model itself, before temperature, penalties and a grammar."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .sampling import likeliest


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The log-probability of a token, in nats, and of the likeliest at its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """Tokens and their log-probabilities, the likeliest first."""


def token_logprobs(logits: NDArray[Any], token: int, top: int) -> TokenLogprobs:
    """Return log softmax(logits)[token] and those of the `top` likeliest tokens, given logits [V]."""
    shifted = logits.astype(np.float64) - float(logits.max())
    normalizer = float(np.log(np.exp(shifted).sum()))
    tokens = likeliest(logits, top) if top else np.zeros(0, np.int64)
    tokens = tokens[np.argsort(-shifted[tokens], kind="stable")]
    best = tuple((int(each), float(shifted[each]) - normalizer) for each in tokens)
    return TokenLogprobs(token, float(shifted[token]) - normalizer, best)
