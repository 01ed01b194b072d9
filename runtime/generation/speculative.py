"""The exact rejection rule of speculative decoding: which drafted tokens stand, and what follows them.

Leviathan, Kalman and Matias, arXiv 2211.17192; Chen et al., arXiv 2302.01318. A draft d that was drawn
from q is accepted with probability min(1, p(d) / q(d)), where p is the model's distribution at its
place. At the first rejection the token is drawn from max(p − q, 0) instead, which makes its
distribution p again; where all are accepted, one more is drawn from the next p. So tokens have the
distribution of decoding one by one, whatever the drafter does; a bad one only costs time. Greedy
decoding is the same rule with distributions that are certain: a draft stands where it is the argmax.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .distribution import Distribution


@dataclass(frozen=True, slots=True)
class Draft:
    """A drafted token, and the distribution that it was drawn from."""

    token: int
    proposed: Distribution


@dataclass(frozen=True, slots=True)
class Verdict:
    """How many drafts stand, and the token after them."""

    accepted: int
    following: int


def judge(drafts: Sequence[Draft], target: Callable[[int], Distribution], generator: np.random.Generator) -> Verdict:
    """Judge `drafts` in order; `target(i)` is the model's distribution after i of them."""
    for i, draft in enumerate(drafts):
        p, q = target(i), draft.proposed
        if generator.random() * q.probability(draft.token) < p.probability(draft.token):
            continue
        # p and q may differ by rounding only; then nothing exceeds and p itself is right
        return Verdict(i, (p.excess(q) or p).draw(generator))
    return Verdict(len(drafts), target(len(drafts)).draw(generator))
