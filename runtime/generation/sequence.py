"""One sequence of a batch: its tokens, how the next is chosen, and whether it has ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from n3c.ir.diagnostics import N3CError
from n3c.runtime.numbers import require_number

from .distribution import Distribution, certain
from .grammar import Grammar
from .guide import Guide
from .logprobs import TokenLogprobs, token_logprobs
from .prefix_cache import Entry
from .reasoning import Reasoning, Tags
from .sampling import Sampling
from .speculative import Draft
from .text import GrowingText
from .tokenizer import Tokenizer

Ending = Literal["stop", "length", "interrupted", "failed"]


@dataclass(frozen=True, slots=True)
class Options:
    """How sequences are continued, and where they end."""

    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    stop_texts: tuple[str, ...] = ()
    """Needs a tokenizer."""
    shown: frozenset[str] = frozenset()
    """Special tokens that are part of the text."""
    tags: Tags | None = None
    reasoning_budget: int | None = None
    """Tokens between the tags after which the end tag is forced; None: no limit."""
    grammar: Grammar | None = None
    """What the new tokens must spell, after the thinking tags where the prompt opens them."""
    logprobs: int | None = None
    """Log-probabilities come with every new token, and those of so many of the likeliest; None: no."""
    prompt_logprobs: bool = False
    """And with the tokens of the prompt, which is then read token by token."""

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
    guide: Guide
    """The state behind `tokens`."""
    tokens: list[int] = field(default_factory=list[int])
    ending: Ending | None = None
    answered: int = 0
    """Tokens at the end of the prompt that are new: with other weights it was begun again since they were drawn."""
    failure: N3CError | None = None
    """Why it failed: of the sequences of a batch it alone ends."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    """Of the tokens of the prompt that were read, without the first, where they are asked for."""
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
        growing = GrowingText(tokenizer, options.stop_texts, options.shown) if tokenizer is not None else None
        reasoning = Reasoning(options.tags, options.reasoning_budget) if options.tags is not None else None
        grammar = options.grammar.copy() if options.grammar is not None else None
        guide = Guide.begin(prompt, options.sampling, reasoning, grammar)
        generator = options.sampling.generator(index)
        return Running(tuple(prompt), options, generator, growing, guide, list(prompt))

    @property
    def is_read(self) -> bool:
        """Whether all of the prompt is read."""
        return self.read == len(self.prompt)

    @property
    def new(self) -> list[int]:
        """The tokens after the prompt that was given, the one that stopped it too."""
        return self.tokens[len(self.prompt) - self.answered :]

    @property
    def drawn(self) -> int:
        """How many they are."""
        return len(self.tokens) - len(self.prompt) + self.answered

    @property
    def text(self) -> str | None:
        """The text of the new tokens as far as it is certain, which is all of it at the end; None without tokenizer."""
        return self.growing.text if self.growing is not None else None

    @property
    def reads_logprobs(self) -> bool:
        """Whether log-probabilities come of the tokens of its prompt, which is then read token by token."""
        return self.options.prompt_logprobs and not self.answered

    def again(self) -> None:
        """Be read again, the tokens so far as its prompt: the engine's states of them are gone."""
        self.answered += len(self.tokens) - len(self.prompt)
        self.prompt = tuple(self.tokens)
        self.read = self.held = self.pending = 0
        self.cached = self.hidden = None
        if not self.answered:
            self.prompt_logprobs.clear()

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

    def _follow(self, token: int) -> None:
        """Move the guide on, and end where it lets nothing follow."""
        try:
            self.guide = self.guide.after(token)
        except N3CError as error:
            self.fail(error)
        else:
            if self.guide.complete:
                self.ending = "stop"

    def fail(self, failure: N3CError) -> None:
        """End a sequence that runs, for it cannot go on."""
        if self.ending is None:
            self.interrupt()
            self.ending, self.failure = "failed", failure

    def choice(self, logits: NDArray[Any], guide: Guide) -> Distribution:
        """Return what the next token is drawn from, given logits [V] and the state before it.

        Where there is no such token the sequence fails, and any will do.
        """
        try:
            return guide.distribution(logits)
        except N3CError as error:
            self.fail(error)
            return certain(0)

    def choices(self, drafts: Sequence[Draft], logits: NDArray[Any]) -> Callable[[int], Distribution]:
        """Return a function of n: what the token after n of `drafts` is drawn from, given logits [1 + drafts, V].

        It may be asked only for drafts that were accepted before.
        """
        states = [self.guide]

        def choice(n: int) -> Distribution:
            while len(states) <= n:
                states.append(states[-1].after(drafts[len(states) - 1].token))
            return self.choice(logits[n], states[n])

        return choice

    def logprobs(self, logits: NDArray[Any], token: int) -> TokenLogprobs | None:
        """Return the log-probabilities at a token's place, given logits [V], where they are asked for."""
        top = self.options.logprobs
        return None if top is None else token_logprobs(logits, token, top)

    def take(self, token: int, context_length: int) -> str:
        """Append a generated token; return the text that became certain, all of it where the sequence ends."""
        self.tokens.append(token)
        piece = ""
        if token in self.options.stop_ids:
            self.ending = "stop"
        elif self.growing is not None:
            piece = self.growing.feed(token)
            if self.growing.stopped:
                self.ending = "stop"
        if self.ending is None:
            self._follow(token)
        if self.ending is None and (self.drawn >= self.options.max_new_tokens or len(self.tokens) >= context_length):
            self.ending = "length"
        return piece + self.growing.finish() if self.ending is not None and self.growing is not None else piece
