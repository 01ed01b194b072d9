"""Answers that must call tools: by the official client, whole and streamed, from a stand-in that says anything."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import openai
import pytest
from openai import OpenAI

from n3c.runtime.engines.interface import Array
from n3c.runtime.generation.grammar import Grammars
from n3c.runtime.generation.tokenizer import ByteTokenizer, Tokenizer
from n3c.runtime.serve.errors import ApiError
from n3c.runtime.serve.tool_calls import Call, ToolCallStream
from n3c.runtime.serve.tool_grammar import Answer, grammar
from support.fake_engine import Logits
from support.serving_http import TEMPLATE, listening, scripted_served
from support.small_tokenizer import VOCAB, open_tokenizer, write_tokenizer

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 4},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "units": {"type": "string", "enum": ["metric", "imperial"]},
        "place": {"$ref": "#/$defs/place"},
    },
    "required": ["city", "units"],
    "$defs": {"place": {"properties": {"indoor": {"type": "boolean"}}, "additionalProperties": False}},
}
NOTHING: dict[str, Any] = {"type": "object", "properties": {}}
SCHEMAS = {"weather": WEATHER, "now": NOTHING}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()
]
NAMED: Any = {"type": "function", "function": {"name": "weather"}}
NUMBER: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer", "maximum": 99}}}
ASKED: dict[str, Any] = {
    "model": "small",
    "messages": [{"role": "user", "content": "What is the weather?"}],
    "tools": TOOLS,
    "max_tokens": 300,
    "seed": 4,
    "extra_body": {"reasoning_budget": 3},
}


def anything(tokenizer: Tokenizer) -> Logits:
    """Return a model of random logits, which depend on the last tokens; it thinks, and likes to call tools."""
    tool_call, thought = (tokenizer.encode(tag, special=False)[0] for tag in ("<tool_call>", "</think>"))

    def model(tokens: Sequence[int]) -> Array:
        logits = np.random.default_rng(list(tokens[-3:])).normal(size=VOCAB).astype(np.float32)
        logits[[tool_call, thought]] += (3, -9)
        return logits

    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("anything")
    write_tokenizer(folder, TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return open_tokenizer(folder)


@pytest.fixture(scope="module")
def client(folder: Path, tokenizer: Tokenizer) -> Iterator[OpenAI]:
    with listening(scripted_served(folder, anything(tokenizer))) as server:
        yield OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def require_fit(calls: Sequence[Any]) -> None:
    """Raise where the arguments of a call are not those of its function."""
    for call in calls:
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_call_is_made(client: OpenAI, choice: Any, temperature: float) -> None:
    answer: Any = client.chat.completions.create(
        **ASKED, tool_choice=choice, temperature=temperature, n=3, parallel_tool_calls=False
    )
    for each in answer.choices:
        assert len(each.message.tool_calls) == 1 and each.message.reasoning_content
        assert each.message.content is None
        require_fit(each.message.tool_calls)
        if choice is NAMED:
            assert each.message.tool_calls[0].function.name == "weather" and each.finish_reason == "stop"
        else:
            assert each.finish_reason == "tool_calls"


def test_the_same_as_a_stream_and_without_drafts(client: OpenAI, folder: Path, tokenizer: Tokenizer) -> None:
    arguments: dict[str, Any] = {**ASKED, "tool_choice": "required", "parallel_tool_calls": False, "temperature": 1.0}
    whole: Any = client.chat.completions.create(**arguments).choices[0].message
    told = [(call.function.name, call.function.arguments) for call in whole.tool_calls]
    with client.chat.completions.stream(**arguments) as stream:
        events = [event.type for event in stream]
        final: Any = stream.get_final_completion().choices[0].message
    assert [(call.function.name, call.function.arguments) for call in final.tool_calls] == told
    assert "tool_calls.function.arguments.done" in events and not final.content
    with listening(scripted_served(folder, anything(tokenizer), drafts=False)) as other:
        plain = OpenAI(base_url=f"{other.url}/v1", api_key="none", max_retries=0)
        again: Any = plain.chat.completions.create(**arguments).choices[0].message
    assert [(call.function.name, call.function.arguments) for call in again.tool_calls] == told


def test_several_calls_and_an_answer_of_a_schema(client: OpenAI) -> None:
    """Each of many answers is one of the schema, or calls that fit theirs; both occur."""
    answer: Any = client.chat.completions.create(**ASKED, response_format=NUMBER, n=16, temperature=1.0)
    kinds: set[str] = set()
    for each in answer.choices:
        kinds.add("calls" if each.message.tool_calls else "answer")
        require_fit(each.message.tool_calls or ())
        if not each.message.tool_calls:
            assert json.loads(each.message.content) <= 99 and each.finish_reason == "stop"
    assert kinds == {"calls", "answer"}
    none: Any = client.chat.completions.create(**ASKED, response_format=NUMBER, tool_choice="none")
    assert json.loads(none.choices[0].message.content) <= 99


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tools": []}, "tools"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools"),
        ({"tool_choice": "always"}, "tool_choice"),
    ],
)
def test_choices_that_are_refused(client: OpenAI, changes: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**{**ASKED, **changes})
    assert error.value.param == param


def of(**properties: Any) -> dict[str, Any]:
    """Return a schema of required properties."""
    return {"type": "object", "properties": properties, "required": list(properties)}


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "array"}, "no schema of an object"),
        (of(**{"a b": {"type": "string"}}), "no parameter can have the name"),
        (of(**{"a>": {"type": "string"}}), "no parameter can have the name"),
        ({**of(), "minProperties": 1}, "`minProperties`"),
        (of(a={"type": "string", "enum": []}), "no text"),
        (of(a={"type": "string", "const": "</parameter>"}), "no text"),
        (of(a={"type": "string", "minLength": "0}/ /x"}), "no length"),
        (of(a={"type": "string", "pattern": "^a|b"}), "`|` beside"),
        (of(a={"type": "string", "pattern": 3}), "no pattern"),
        (of(a={"type": "string", "not": {}}), "`not`"),
        (of(a={"type": "string", "enum": "ab"}), "no text"),
        ({"required": [3]}, "no schema of an object"),
        ({"properties": 3}, "no schema of an object"),
    ],
)
def test_schemas_that_no_call_can_be_held_to(schema: dict[str, Any], reason: str) -> None:
    with pytest.raises(ApiError, match="tools: `f") as error:
        grammar(Answer({"f": schema}, required=True, several=False), lambda _: None)
    assert reason in str(error.value)


def test_what_llguidance_refuses(client: OpenAI) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": of(a={"type": "array", "uniqueItems": True})}}
    arguments: dict[str, Any] = {**ASKED, "tools": [tool], "tool_choice": "required"}
    with pytest.raises(openai.BadRequestError, match="uniqueItems") as error:
        client.chat.completions.create(**arguments)
    assert error.value.param == "tools"


HARD = {
    "f": of(
        text={"type": "string", "minLength": 1, "maxLength": 6},
        slashes={"type": "string", "pattern": r"^a/[b\/|]{1,3}\\$"},
        found={"type": "string", "pattern": "b|cd", "maxLength": 8},
        union={"anyOf": [{"type": "string", "maxLength": 3}, {"type": "null"}]},
        quoted={"type": "string", "enum": ['"', "a\nb", "ü", "\\", "longer"], "maxLength": 3},
        any={"enum": [1, "</parameter>", {"</tool_call>": None}]},
    )
}


@pytest.mark.parametrize("kind", ["tokens", "texts"])
@pytest.mark.parametrize("free", [False, True])
def test_every_text_of_the_grammar_is_read_as_calls_that_fit(tokenizer: Tokenizer, kind: str, free: bool) -> None:
    """Random walks through what is allowed: texts with slashes, quotes, newlines, and JSON that holds end tags.

    Tags are tokens of their own, or texts.
    """
    tokenizer, size = (tokenizer, VOCAB) if kind == "tokens" else (ByteTokenizer(), 256)
    end = tokenizer.encode("<|im_end|>", special=False)[0] if kind == "tokens" else 0
    grammars = Grammars.of(tokenizer, size, frozenset((end,)))

    def token(text: str) -> int | None:
        return tokenizer.encode(text, special=False)[0] if text in tokenizer.added else None

    whole = grammars.lark(grammar(Answer(HARD, required=not free, several=True), token))
    called = 0
    for seed in range(6):
        random, place, ids = np.random.default_rng(seed), whole.copy(), list[int]()
        if free:
            for each in tokenizer.encode("See: <tool_call>", special=False):
                ids.append(each)
                place = place.after(each)
        while not place.complete and len(ids) < 900:
            allowed = np.flatnonzero(place.allowed(size))
            ids.append(end if end in allowed else int(random.choice(allowed)))
            place = place.after(ids[-1])
        assert ids[-1] == end
        text = b"".join(map(tokenizer.token_bytes, ids[:-1])).decode()
        stream = ToolCallStream(HARD)
        found = [each for at in range(0, len(text), 7) for each in stream.feed(text[at : at + 7])]
        rest = "".join(each for each in found if isinstance(each, str)) + stream.finish()
        assert rest == ("See:" if free else "")
        calls = [each for each in found if isinstance(each, Call)]
        for call in calls:
            jsonschema.validate(json.loads(call.arguments), HARD["f"])
        called += len(calls)
    assert called >= 6
