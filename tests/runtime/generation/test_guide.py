"""What the tokens before say about the next: penalties against transformers, grammars against jsonschema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from n3c.ir.diagnostics import N3CError
from n3c.runtime.generation.capacity import Capacity
from n3c.runtime.generation.drafter import MtpDrafter
from n3c.runtime.generation.grammar import ANY_OBJECT, Grammars
from n3c.runtime.generation.guide import Guide
from n3c.runtime.generation.logprobs import token_logprobs
from n3c.runtime.generation.loop import Generation
from n3c.runtime.generation.reasoning import Reasoning, Tags
from n3c.runtime.generation.sampling import Sampling, distribution
from n3c.runtime.generation.sequence import Options
from n3c.runtime.generation.tokenizer import ByteTokenizer, Tokenizer, decoded
from support.fake_engine import FakeEngine, Logits
from support.small_tokenizer import END, VOCAB, open_tokenizer, write_tokenizer

SIZE = 40
LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=SIZE, max_size=SIZE, unique=True)
TOKENS = st.lists(st.integers(0, SIZE - 1), max_size=12)


def changed(guide: Guide, logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the logits that a guide makes, up to a constant, by what is drawn from at temperature 1."""
    with np.errstate(divide="ignore"):
        return np.log(guide.distribution(logits).dense(len(logits)))


@given(LOGITS, st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=9), TOKENS, st.floats(0.2, 5))
def test_repetition_penalty_is_that_of_transformers(
    logits: list[float], prompt: list[int], new: list[int], penalty: float
) -> None:
    values = np.array(logits, np.float32)
    guide = Guide.begin(prompt, Sampling(1.0, repetition_penalty=penalty), None, None)
    for token in new:
        guide = guide.after(token)
    processor = RepetitionPenaltyLogitsProcessor(penalty=penalty)
    ids: Any = torch.tensor([[*prompt, *new]])
    expected = processor(ids, cast("Any", torch.tensor(values)[None]))[0]
    np.testing.assert_allclose(np.exp(changed(guide, values)), expected.softmax(-1).numpy(), rtol=1e-4, atol=1e-6)


@given(LOGITS, TOKENS, TOKENS, st.floats(-2, 2), st.floats(-2, 2))
def test_presence_and_frequency_count_what_was_generated(
    logits: list[float], prompt: list[int], new: list[int], presence: float, frequency: float
) -> None:
    """OpenAI's equation: mu - c alpha_frequency - (c > 0) alpha_presence."""
    sampling = Sampling(1.0, presence_penalty=presence, frequency_penalty=frequency, logit_bias={3: 2.5})
    guide = Guide.begin(prompt, sampling, None, None)
    for token in new:
        guide = guide.after(token)
    counts = np.bincount(np.array(new, np.int64), minlength=SIZE)
    expected = np.array(logits) - counts * frequency - (counts > 0) * presence
    expected[3] += 2.5
    expected = np.exp(expected - expected.max())
    np.testing.assert_allclose(
        np.exp(changed(guide, np.array(logits, np.float32))), expected / expected.sum(), rtol=1e-4, atol=1e-6
    )


@given(LOGITS, st.floats(0, 1), st.integers(1, SIZE), st.floats(0.05, 1), st.floats(0.3, 3))
def test_min_p_is_that_of_transformers(
    logits: list[float], min_p: float, top_k: int, top_p: float, temperature: float
) -> None:
    """After top-k and top-p; where rounding decides whether a token is kept, both are right."""
    values: Any = torch.tensor(logits)[None] / temperature
    unused: Any = torch.zeros(1, 1, dtype=torch.long)
    for warper in (TopKLogitsWarper(top_k), TopPLogitsWarper(top_p), MinPLogitsWarper(min_p)):
        values = warper(unused, values)
    expected = values[0].softmax(-1).double().numpy()
    found = distribution(np.array(logits, np.float32), Sampling(temperature, top_k, top_p, min_p=min_p)).dense(SIZE)
    different = (expected > 0) != (found > 0)
    assert different.sum() <= 1
    if not different.any():
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)


@given(LOGITS, st.integers(0, SIZE - 1), st.integers(0, SIZE))
def test_log_probabilities(logits: list[float], token: int, top: int) -> None:
    values = np.array(logits, np.float32)
    expected = torch.tensor(values).double().log_softmax(-1)
    found = token_logprobs(values, token, top)
    assert found.logprob == pytest.approx(float(expected[token]), abs=1e-9)
    np.testing.assert_allclose([logprob for _, logprob in found.top], expected.topk(top).values.numpy(), atol=1e-9)
    assert all(logprob == pytest.approx(float(expected[each]), abs=1e-9) for each, logprob in found.top)


CLOSED = {"type": "object", "additionalProperties": False}
SCHEMAS: list[dict[str, Any]] = [
    {"properties": {"a": {"type": "integer"}}, "required": ["a"], **CLOSED},
    {"type": "array", "items": {"enum": ["x", "yy"]}, "maxItems": 3},
    {"type": "string", "pattern": "^[ab]{2,5}$"},
    {"anyOf": [{"type": "boolean"}, {"type": "integer", "minimum": 5, "maximum": 99}]},
    {"const": "ö</think>"},
    {"$ref": "#/$defs/n", "$defs": {"n": {"properties": {"n": {"$ref": "#/$defs/n"}}, **CLOSED}}},
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Grammars, int]]:
    folder = tmp_path_factory.mktemp("grammar")
    write_tokenizer(folder)
    found = open_tokenizer(folder)
    return {
        "bytes": (ByteTokenizer(), Grammars.of(ByteTokenizer(), 256, frozenset()), 256),
        "file": (found, Grammars.of(found, VOCAB, frozenset((END,))), VOCAB),
    }


def noisy(size: int, seed: int) -> Logits:
    """A model whose logits are any function of the last three tokens."""

    def model(tokens: Any) -> Any:
        last = [int(token) for token in tokens[-3:]]
        return np.random.default_rng((seed, len(tokens) // 7, *last)).normal(size=size).astype(np.float32) * 4

    return model


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("kind", ["bytes", "file"])
@pytest.mark.parametrize("schema", SCHEMAS)
def test_answers_fit_and_drafts_change_nothing(
    schema: dict[str, Any],
    kind: str,
    drafts: bool,
    temperature: float,
    tokenizers: dict[str, tuple[Tokenizer, Grammars, int]],
) -> None:
    tokenizer, grammars, size = tokenizers[kind]
    options = Options(
        max_new_tokens=400,
        grammar=grammars.schema(schema),
        sampling=Sampling(temperature, seed=1),
        stop_ids=grammars.ends,
    )
    texts: list[str] = []
    for drafter in (None, MtpDrafter()) if drafts and temperature == 0 else (MtpDrafter() if drafts else None,):
        engine = FakeEngine(noisy(size, 1), batch=2, drafts=noisy(size, 1 if temperature else 2))
        generation = Generation(engine, [[1, 2], [7]], options, Capacity(500, size), tokenizer, drafter)
        generation.run()
        for sequence in generation.sequences:
            text = decoded(tokenizer, [token for token in sequence.new if token not in grammars.ends])
            if sequence.ending == "stop":
                jsonschema.validate(json.loads(text), schema)
            texts.append(text)
        assert any(sequence.ending == "stop" for sequence in generation.sequences)
    assert texts[:2] == texts[-2:]


def test_a_grammar_begins_behind_the_reasoning(tokenizers: dict[str, tuple[Tokenizer, Grammars, int]]) -> None:
    tokenizer, grammars, _ = tokenizers["file"]
    tags = Tags(*(tuple(tokenizer.encode(tag, special=False)) for tag in ("<think>", "</think>")))
    options = Options(
        max_new_tokens=60, grammar=grammars.schema({"const": "<think>"}), tags=tags, reasoning_budget=5,
        stop_ids=grammars.ends,
    )  # fmt: skip
    for drafter in (None, MtpDrafter()):
        engine = FakeEngine(noisy(VOCAB, 3))
        generation = Generation(engine, [[9, *tags.start]], options, Capacity(90, VOCAB), tokenizer, drafter)
        generation.run()
        new = generation.sequences[0].new
        end = new.index(tags.end[0])
        assert end <= 5
        text = decoded(tokenizer, [token for token in new[end + 1 :] if token not in grammars.ends])
        assert json.loads(text) == "<think>"


def test_places_of_a_grammar_are_left_and_come_back_to(tokenizers: dict[str, tuple[Tokenizer, Grammars, int]]) -> None:
    """As drafts do that are rejected: the mask depends on the path alone."""
    _, grammars, size = tokenizers["bytes"]
    schema = {"type": "array", "items": {"type": "integer"}}
    random = np.random.default_rng(0)
    places = [grammars.schema(schema)]
    for _ in range(300):
        at = places[int(random.integers(len(places)))]
        allowed = np.flatnonzero(at.allowed(size))
        places.append(at.after(int(random.choice(allowed))))
    for place in random.permutation(len(places)):
        path, at = list[int](), places[place]
        complete, again = at.complete, grammars.schema(schema)
        mask = at.allowed(size)
        while at.parent is not None:
            path.append(at.token)
            at = at.parent
        for token in path[::-1]:
            again = again.after(token)
        assert again.complete == complete
        assert (again.allowed(size) == mask).all()


def test_a_token_that_is_not_allowed(tokenizers: dict[str, tuple[Tokenizer, Grammars, int]]) -> None:
    _, grammars, size = tokenizers["bytes"]
    grammar = grammars.schema(ANY_OBJECT)
    assert np.flatnonzero(grammar.allowed(size)).tolist() == [ord("{")]
    with pytest.raises(N3CError, match="E0842"):
        grammar.after(ord("x"))
    Guide.begin([1], Sampling(), Reasoning(Tags((1,), (2,)), None), grammar).after(ord("x"))  # still reasons


@pytest.mark.parametrize("schema", [{"type": "nope"}, {"not": {}}, {"type": "string", "pattern": "("}, {"$ref": "x"}])
def test_schemas_that_are_refused(
    schema: dict[str, Any], tokenizers: dict[str, tuple[Tokenizer, Grammars, int]]
) -> None:
    with pytest.raises(N3CError, match="E0841"):
        tokenizers["bytes"][1].schema(schema)


def test_a_lark_grammar(tokenizers: dict[str, tuple[Tokenizer, Grammars, int]], tmp_path: Path) -> None:
    grammars = tokenizers["bytes"][1]
    grammar = grammars.lark('start: "ab" | "cd"')
    assert grammar.after(ord("a")).after(ord("b")).complete
    with pytest.raises(N3CError, match="E0841"):
        grammars.lark("start: nothing")
