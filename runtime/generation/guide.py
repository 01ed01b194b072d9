"""What the tokens before say about the next one, beside the model: penalties, a reasoning budget, a grammar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .distribution import Distribution, certain
from .grammar import Grammar
from .reasoning import Reasoning
from .sampling import Sampling, distribution, require_finite


@dataclass(frozen=True, slots=True)
class Seen:
    """The tokens that penalties look at."""

    prompt: frozenset[int]
    generated: Mapping[int, int]
    """Token → how many times."""

    def after(self, token: int) -> Seen:
        """Return what was seen after `token`."""
        return Seen(self.prompt, {**self.generated, token: self.generated.get(token, 0) + 1})


@dataclass(frozen=True, slots=True)
class Guide:
    """The state behind the tokens of a sequence. Immutable, so drafts are followed without changing the sequence."""

    sampling: Sampling
    reasoning: Reasoning | None = None
    grammar: Grammar | None = None
    """Of the answer: it begins where the reasoning has ended."""
    seen: Seen | None = None
    """None: no penalty is asked for."""

    @staticmethod
    def begin(prompt: Sequence[int], sampling: Sampling, reasoning: Reasoning | None, grammar: Grammar | None) -> Guide:
        """Return the state after `prompt`."""
        seen = Seen(frozenset(prompt), {}) if sampling.penalizes else None
        return Guide(sampling, None if reasoning is None else reasoning.begin(prompt), grammar, seen)._settled()

    def after(self, token: int) -> Guide:
        """Return the state after `token`. N3CError (E0842, exit code 5) where the grammar does not allow it."""
        if self.reasoning is None and self.grammar is None and self.seen is None:
            return self
        return replace(
            self,
            reasoning=None if self.reasoning is None else self.reasoning.after(token),
            grammar=self.grammar.after(token) if self.grammar is not None and not self.reasons else self.grammar,
            seen=None if self.seen is None else self.seen.after(token),
        )._settled()

    def _settled(self) -> Guide:
        """Return the state without reasoning where the grammar has begun: tags in its text are text."""
        begun = self.grammar is not None and self.reasoning is not None and not self.reasons
        return replace(self, reasoning=None) if begun else self

    @property
    def reasons(self) -> bool:
        """Whether the next token is between the thinking tags, or the rest of the end tag."""
        return self.reasoning is not None and self.reasoning.used is not None

    @property
    def complete(self) -> bool:
        """Whether the grammar lets nothing follow."""
        return self.grammar is not None and self.grammar.complete

    def distribution(self, logits: NDArray[Any]) -> Distribution:
        """Return what the next token is drawn from, given the model's logits [V].

        Raises N3CError (exit code 5) where a logit is not finite.
        """
        require_finite(logits)
        if self.reasoning is not None and self.reasoning.next is not None:
            return certain(self.reasoning.next)
        return distribution(self._changed(logits), self.sampling)

    def _changed(self, logits: NDArray[Any]) -> NDArray[Any]:
        """Return logits [V] with biases, then penalties, and minus infinity for what the grammar does not allow."""
        sampling, grammar = self.sampling, None if self.reasons else self.grammar
        if not sampling.logit_bias and self.seen is None and grammar is None:
            return logits
        changed = logits.astype(np.float32)
        for token, bias in sampling.logit_bias.items():
            changed[token] += np.float32(bias)
        if self.seen is not None:
            _penalize(changed, self.seen, sampling)
        if grammar is not None:
            changed[~grammar.allowed(len(changed))] = -np.inf
        return changed


def _penalize(logits: NDArray[np.float32], seen: Seen, sampling: Sampling) -> None:
    """Apply penalties to logits [V] where they are."""
    factor = np.float32(sampling.repetition_penalty)
    if factor != 1:
        repeated = np.fromiter(seen.prompt | seen.generated.keys(), np.int64)
        values = logits[repeated]
        logits[repeated] = np.where(values > 0, values / factor, values * factor)
    if seen.generated:
        tokens = np.fromiter(seen.generated.keys(), np.int64)
        counts = np.fromiter(seen.generated.values(), np.float32)
        logits[tokens] -= np.float32(sampling.frequency_penalty) * counts + np.float32(sampling.presence_penalty)
