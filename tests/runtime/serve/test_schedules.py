"""Random schedules under the scheduler: every request gets what it gets alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest

from n3c.runtime.engines.interface import Array
from n3c.runtime.generation.batch import Batch
from n3c.runtime.generation.capacity import Capacity
from n3c.runtime.generation.drafter import Drafter, MtpDrafter
from n3c.runtime.generation.grammar import Grammar, Grammars
from n3c.runtime.generation.prefix_cache import PrefixCache
from n3c.runtime.generation.reasoning import Tags
from n3c.runtime.generation.sampling import Sampling
from n3c.runtime.generation.sequence import Ending, Options
from n3c.runtime.generation.tokenizer import ByteTokenizer
from n3c.runtime.serve.scheduler import Scheduler, Ticket, Token, Update, Work
from n3c.runtime.serve.tool_grammar import Answer, grammar
from support.fake_engine import FakeEngine, Logits

VOCAB = 256
CAPACITY = Capacity(96, VOCAB)
TOKENIZER = ByteTokenizer()
GRAMMARS = Grammars.of(TOKENIZER, VOCAB, frozenset((0,)))
SCHEMAS: tuple[dict[str, Any], ...] = (
    {"type": "array", "items": {"enum": [1, 22]}, "maxItems": 3},
    {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False},
    {"type": "string", "maxLength": 4},
)
TOOLS: dict[str, dict[str, Any]] = {
    "f": {"properties": {"a": {"type": "integer"}, "b": {"type": "string", "maxLength": 2}}},
    "g": {},
}
CALLS = [
    grammar(Answer(TOOLS, required=required, several=several, schema=schema), lambda _: None)
    for required, several, schema in ((True, True, None), (False, False, None), (False, True, SCHEMAS[0]))
]
TEXT = np.frombuffer(b'abcdefgh "[]{}:,12<', np.uint8).astype(np.int64)


def model(seed: int) -> Logits:
    """A model that depends on the last two tokens, and likes a few characters."""
    known: dict[tuple[int, ...], Array] = {}

    def logits(tokens: Sequence[int]) -> Array:
        last = tuple(tokens[-2:])
        if last not in known:
            values = np.random.default_rng((seed, *last)).normal(size=VOCAB).astype(np.float32)
            values[TEXT] += 4
            values[0] += 3
            known[last] = values
        return known[last]

    return logits


@dataclass
class Asked:
    """A request: what it is, when it comes, after how many updates it is cancelled, and what it got."""

    work: Work
    arrives: int
    patience: int | None
    tokens: list[Token] = field(default_factory=list[Token])
    ending: Ending | None = None
    updates: int = 0
    ticket: Ticket | None = None


def constraint(random: np.random.Generator) -> Grammar | None:
    """Draw a grammar: of a schema, of calls, or none."""
    kind, index = random.random(), int(random.integers(3))
    if kind < 0.2:
        return GRAMMARS.schema(SCHEMAS[index])
    return GRAMMARS.lark(CALLS[index]) if kind < 0.4 else None


def drawn(random: np.random.Generator, count: int) -> list[Asked]:
    """Draw requests; many begin as others do, some have schemas or tools, penalties, a budget, stops."""
    asked: list[Asked] = []
    for index in range(count):
        prompt = random.choice(TEXT, int(random.integers(1, 24))).tolist()
        if asked and random.random() < 0.6:
            other = asked[int(random.integers(len(asked)))].work.prompt
            prompt = [*other[: int(random.integers(1, len(other) + 1))], *prompt[: int(random.integers(0, 8))]]
        temperature = float(random.choice([0.0, 0.7, 1.3]))
        penalized = random.random() < 0.3
        options = Options(
            max_new_tokens=int(random.choice([int(random.integers(0, 14)), 40], p=[0.8, 0.2])),
            sampling=Sampling(
                temperature,
                top_k=int(random.choice([0, 5])),
                top_p=float(random.choice([1.0, 0.8])),
                seed=int(random.integers(100)),
                min_p=float(random.choice([0.0, 0.1])),
                presence_penalty=float(penalized),
                repetition_penalty=1.3 if penalized else 1.0,
                logit_bias={int(random.choice(TEXT)): 3.0} if random.random() < 0.2 else {},
            ),
            stop_ids=frozenset((0,)),
            stop_texts=("ab",) if random.random() < 0.2 else (),
            tags=Tags((ord("<"),), (ord(">"),)) if random.random() < 0.3 else None,
            reasoning_budget=int(random.integers(0, 5)) if random.random() < 0.5 else None,
            grammar=constraint(random),
            logprobs=int(random.integers(3)) if random.random() < 0.3 else None,
            prompt_logprobs=bool(random.random() < 0.1),
        )
        patience = int(random.integers(0, 5)) if random.random() < 0.2 else None
        asked.append(Asked(Work(tuple(prompt), options, index % 3), int(random.integers(0, 16)), patience))
    return asked


def scheduler(seed: int, *, drafts: bool, sizes: Sequence[int], memory: int | None) -> Scheduler:
    engine = FakeEngine(model(seed), batch_sizes=sizes, chunk=8, draft_tokens=2, drafts=model(seed // 2))
    drafter: Drafter | None = MtpDrafter() if drafts else None
    cache = None if memory is None else PrefixCache(memory, drafts)
    return Scheduler(Batch(engine, CAPACITY, drafter, cache), TOKENIZER, queue=100)


def run(scheduler: Scheduler, asked: Sequence[Asked]) -> None:
    """Submit as they arrive, cancel those whose patience ends, and go on until all is done."""

    def deliver(each: Asked, update: Update) -> None:
        each.updates += 1
        each.tokens += update.tokens
        each.ending = update.ending

    now = 0
    while now == 0 or not scheduler.idle or any(each.ticket is None for each in asked):
        for each in asked:
            if each.ticket is None and each.arrives <= now:
                each.ticket = scheduler.ticket(each.work, partial(deliver, each))
                scheduler.submit(each.ticket)
            if each.ticket is not None and each.patience is not None and each.updates >= each.patience:
                scheduler.cancel(each.ticket)
        scheduler.step()
        now += 1


def different(seed: int) -> int:
    """Run a random schedule; return how many of its requests got something else than alone."""
    random = np.random.default_rng(seed)
    drafts, memory = bool(random.random() < 0.6), [None, 2000, 10**9][int(random.integers(3))]
    asked = drawn(random, 8)
    busy = scheduler(seed, drafts=drafts, sizes=(1, 2, 4), memory=memory)
    run(busy, asked)
    assert busy.idle and not busy.batch.rows
    wrong = 0
    for each in asked:
        alone = Asked(each.work, 0, None)
        run(scheduler(seed, drafts=drafts, sizes=(1,), memory=None), [alone])
        expected = alone.tokens[: len(each.tokens)] if each.ending == "interrupted" else alone.tokens
        wrong += each.tokens != expected or (each.ending != "interrupted" and each.ending != alone.ending)
        assert alone.ending in ("stop", "length")
    return wrong


@pytest.mark.parametrize("seed", range(15))
def test_random_schedules(seed: int) -> None:
    """Arrivals, lengths, cancels, prefixes, drafts, schemas, tool calls, budgets, penalties, log-probabilities."""
    assert different(seed) == 0


@pytest.mark.slow
def test_2000_random_schedules() -> None:
    assert sum(different(1000 + seed) for seed in range(2000)) == 0
