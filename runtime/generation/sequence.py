"""One sequence of a batch: its tokens, how the next is chosen, and whether it has ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from n3c.runtime.numbers import require_number

from .distribution import Distribution, certain
from .prefix_cache import Entry
from .reasoning import Reasoning, Tags
from .sampling import Sampling, distribution
from .speculative import Draft
from .text import GrowingText
from .tokenizer import Tokenizer

Ending = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True, slots=True)
class Options:
    """How sequences are continued, and where they end."""

    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    stop_texts: tuple[str, ...] = ()
    """Needs a tokenizer."""
    tags: Tags | None = None
    reasoning_budget: int | None = None
    """Tokens between the tags after which the end tag is forced; None: no limit."""

    def __post_init__(self) -> None:
        """Raise N3CError (E0816, exit code 2) for a number that is out of its range."""
        require_number("max_new_tokens", self.max_new_tokens, least=0)
        if self.reasoning_budget is not None:
            require_number("reasoning_budget", self.reasoning_budget, least=0)


@dataclass(slots=True)
class Running:
    """A sequence. `tokens` are prompt and continuation; the last of them is not yet in the engine's states."""

    prompt: tuple[int, ...]
    options: Options
    generator: np.random.Generator
    growing: GrowingText | None
    reasoning: Reasoning | None = None
    tokens: list[int] = field(default_factory=list[int])
    ending: Ending | None = None
    answered: int = 0
    """Tokens at the end of the prompt that are new: with other weights it was begun again since they were drawn."""
    read: int = 0
    """Tokens of the prompt that the engine has read."""
    held: int = 0
    """Tokens that the engine's states hold, without those that wait for a verdict; 0 while the prompt is read."""
    cached: Entry | None = None
    """Where the cache of prefixes knows the longest part of it."""
    pending: int = 0
    """Tokens of the last `verify` that the next one commits."""
    hidden: NDArray[Any] | None = None
    """[D], what multi-token prediction reads: the main model's output at the last committed token."""

    @staticmethod
    def begin(prompt: Sequence[int], index: int, options: Options, tokenizer: Tokenizer | None) -> Running:
        """Return sequence `index` of a batch, with nothing generated."""
        growing = GrowingText(tokenizer, options.stop_texts) if tokenizer is not None else None
        reasoning = None
        if options.tags is not None and options.reasoning_budget is not None:
            reasoning = Reasoning(options.tags, options.reasoning_budget).begin(prompt)
        generator = options.sampling.generator(index)
        return Running(tuple(prompt), options, generator, growing, reasoning, list(prompt))

    @property
    def is_read(self) -> bool:
        """Whether all of the prompt is read."""
        return self.read == len(self.prompt)

    @property
    def new(self) -> list[int]:
        """The tokens after the prompt that was given, the one that stopped it too."""
        return self.tokens[len(self.prompt) - self.answered :]

    @property
    def text(self) -> str | None:
        """The text of the new tokens as far as it is certain, which is all of it at the end; None without tokenizer."""
        return self.growing.text if self.growing is not None else None

    def again(self) -> None:
        """Be read again, the tokens so far as its prompt: the engine's states of them are gone."""
        self.answered += len(self.tokens) - len(self.prompt)
        self.prompt = tuple(self.tokens)
        self.read = self.held = self.pending = 0
        self.cached = self.hidden = None

    def interrupt(self) -> None:
        """End a sequence that runs where it is; text that was kept back is its text now."""
        if self.ending is None:
            self.ending = "interrupted"
            if self.growing is not None:
                self.growing.finish()

    @property
    def committed(self) -> int:
        """Tokens that the engine's states hold, with what the next `verify` commits."""
        return len(self.tokens) - 1

    def choice(self, logits: NDArray[Any], reasoning: Reasoning | None) -> Distribution:
        """Return what the next token is drawn from, given logits [V] and the state of reasoning before it."""
        if reasoning is not None and reasoning.next is not None:
            return certain(reasoning.next)
        return distribution(logits, self.options.sampling)

    def choices(self, drafts: Sequence[Draft], logits: NDArray[Any]) -> Callable[[int], Distribution]:
        """Return a function of n: what the token after n of `drafts` is drawn from, given logits [1 + drafts, V]."""
        states = [self.reasoning]
        for draft in drafts:
            before = states[-1]
            states.append(before.after(draft.token) if before is not None else None)
        return lambda n: self.choice(logits[n], states[n])

    def take(self, token: int, context_length: int) -> str:
        """Append a generated token; return the text that became certain, all of it where the sequence ends."""
        self.tokens.append(token)
        if self.reasoning is not None:
            self.reasoning = self.reasoning.after(token)
        piece = ""
        if token in self.options.stop_ids:
            self.ending = "stop"
        elif self.growing is not None:
            piece = self.growing.feed(token)
            if self.growing.stopped:
                self.ending = "stop"
        if self.ending is None and (len(self.new) >= self.options.max_new_tokens or len(self.tokens) >= context_length):
            self.ending = "length"
        return piece + self.growing.finish() if self.ending is not None and self.growing is not None else piece
