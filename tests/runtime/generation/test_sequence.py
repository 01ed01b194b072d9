"""One sequence by itself: what it still has to read, and what is new, also where it is begun again."""

from __future__ import annotations

import numpy as np
import pytest

from n3c.ir.diagnostics import ExitCode, N3CError
from n3c.runtime.generation.logprobs import token_logprobs
from n3c.runtime.generation.sequence import Options, Running


def begun(**options: object) -> Running:
    return Running.begin([1, 2, 3], 0, Options(**options), None)  # type: ignore[arg-type]


def states(sequence: Running) -> tuple[object, ...]:
    """Return what a sequence says of the engine's states."""
    return sequence.read, sequence.held, sequence.pending, sequence.hidden


def test_where_a_sequence_ends() -> None:
    """At its limit of new tokens, at the end of the context, or at a token that stops it."""
    limited, full = begun(max_new_tokens=2), begun(max_new_tokens=9)
    stopped = begun(stop_ids=frozenset({4}))
    for sequence, context, ending in ((limited, 99, "length"), (full, 5, "length"), (stopped, 99, "stop")):
        endings: list[str | None] = []
        for token in (7, 4):
            sequence.take(token, context)
            endings.append(sequence.ending)
        assert endings == [None, ending]
        assert (sequence.new, sequence.drawn, sequence.committed) == ([7, 4], 2, 4)


def test_begun_again_its_new_tokens_are_those_from_the_first() -> None:
    sequence = begun(max_new_tokens=3, prompt_logprobs=True)
    sequence.read = sequence.held = 3
    sequence.pending, sequence.hidden = 1, np.zeros(2)
    assert sequence.is_read and sequence.reads_logprobs
    for token in (7, 8):
        sequence.take(token, 99)
    sequence.prompt_logprobs.append(token_logprobs(np.zeros(9, np.float32), 2, 0))
    sequence.again()
    assert (sequence.prompt, sequence.new, sequence.drawn, sequence.answered) == ((1, 2, 3, 7, 8), [7, 8], 2, 2)
    assert states(sequence) == (0, 0, 0, None)
    assert not sequence.is_read
    assert not sequence.reads_logprobs and len(sequence.prompt_logprobs) == 1  # they are of the prompt that was given
    sequence.take(6, 99)
    assert (sequence.new, sequence.ending) == ([7, 8, 6], "length")
    sequence.again()
    assert (sequence.answered, sequence.drawn) == (3, 3)


def test_begun_again_before_its_first_token_the_prompt_is_read_anew() -> None:
    sequence = begun(prompt_logprobs=True)
    sequence.prompt_logprobs.append(token_logprobs(np.zeros(9, np.float32), 2, 0))
    sequence.again()
    assert sequence.reads_logprobs and not sequence.prompt_logprobs


def test_what_is_not_asked_for() -> None:
    sequence, logits = begun(), np.zeros(9, np.float32)
    assert not sequence.reads_logprobs and sequence.logprobs(logits, 1) is None and sequence.text is None
    found = begun(logprobs=0).logprobs(logits, 1)
    assert found is not None and found.logprob == pytest.approx(-np.log(9)) and not found.top


def test_a_sequence_ends_once() -> None:
    """An interrupt or a failure changes nothing behind the end."""
    sequence, failed = begun(max_new_tokens=1), begun()
    sequence.take(7, 99)
    sequence.interrupt()
    sequence.fail(N3CError([], ExitCode.NUMERICS))
    assert (sequence.ending, sequence.failure) == ("length", None)
    assert failed.choice(np.full(9, np.nan, np.float32), failed.guide).probability(0) == 1
    assert failed.ending == "failed" and failed.failure is not None
