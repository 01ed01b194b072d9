"""The official client of OpenAI, sync and async, through the whole interface of a real server."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any, cast

import jsonschema
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from n3c.runtime.generation.loop import Generation
from n3c.runtime.generation.sampling import Sampling
from n3c.runtime.generation.sequence import Options
from n3c.runtime.generation.tokenizer import decoded
from n3c.runtime.serve.http_server import HttpServer

MODEL = "small"
CHAT: list[Any] = [{"role": "user", "content": "What is the weather?"}]


def alone(server: HttpServer, prompt: list[int], options: Options) -> list[int]:
    """Return the tokens of a request that runs alone, on the server's engine, while the server does nothing."""
    batch = server.served.service.scheduler.batch

    def run() -> list[int]:
        generation = Generation(batch.engine, [prompt], options, batch.capacity, server.served.tokenizer)
        generation.drafter = batch.drafter
        generation.run()
        return generation.sequences[0].new

    return server.served.service.call(run)


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_completion_is_that_of_the_library(client: OpenAI, server: HttpServer, temperature: float) -> None:
    prompt = server.served.tokenizer.encode("You are helpful.")
    options = Options(max_new_tokens=12, sampling=Sampling(temperature, seed=5, top_p=0.9))
    answer = client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=12, temperature=temperature, seed=5, top_p=0.9
    )
    assert answer.choices[0].text == decoded(server.served.tokenizer, alone(server, prompt, options))
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 12)


def test_prompts_of_every_form_and_n(client: OpenAI, server: HttpServer) -> None:
    ids = server.served.tokenizer.encode("What is")
    one = client.completions.create(model=MODEL, prompt="What is", max_tokens=6, temperature=0)
    several: Any = (ids, ["What is", "You are"], [ids, [1, 2, 3]])
    for prompt in several:
        answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=6, temperature=0, n=2)
        assert len(answer.choices) == (2 if prompt is ids else 4)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        assert answer.choices[0].text == answer.choices[1].text == one.choices[0].text
    drawn = client.completions.create(model=MODEL, prompt=ids, max_tokens=8, temperature=1.5, n=3, seed=1)
    again = client.completions.create(model=MODEL, prompt=ids, max_tokens=8, temperature=1.5, n=3, seed=1)
    assert [choice.text for choice in drawn.choices] == [choice.text for choice in again.choices]
    assert len({choice.text for choice in drawn.choices}) > 1


def test_streams_are_the_whole(client: OpenAI) -> None:
    arguments: dict[str, Any] = {"model": MODEL, "prompt": ["What", "is"], "max_tokens": 9, "temperature": 0, "n": 2}
    whole = client.completions.create(**arguments)
    chunks = list(client.completions.create(**arguments, stream=True, stream_options={"include_usage": True}))
    texts = ["".join(c.choices[0].text for c in chunks if c.choices and c.choices[0].index == i) for i in range(4)]
    assert texts == [choice.text for choice in whole.choices]
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_usage_in_every_chunk(client: OpenAI) -> None:
    """Load generators ask for it, by a parameter of vLLM."""
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    prompt: dict[str, Any] = {"model": MODEL, "max_tokens": 5, "stream": True, "stream_options": options}
    for chunks in (
        list(client.completions.create(**prompt, prompt="What")),
        list(client.chat.completions.create(**prompt, messages=CHAT)),
    ):
        counts = [cast("Any", chunk).usage.completion_tokens for chunk in chunks]
        assert counts == sorted(counts) and counts[-1] == 5 and cast("Any", chunks[-1]).choices == []


def test_the_least_top_p_is_greedy(client: OpenAI) -> None:
    arguments: dict[str, Any] = {"model": MODEL, "prompt": "You", "max_tokens": 8}
    greedy = client.completions.create(**arguments, temperature=0).choices[0].text
    assert client.completions.create(**arguments, temperature=2, top_p=0).choices[0].text == greedy


def test_an_answer_may_be_sent_back_as_it_came(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=4).choices[0].message
    for told in (answer, answer.model_dump(), answer.model_dump(exclude_none=True)):
        messages: list[Any] = [*CHAT, told, {"role": "user", "content": "And then?"}]
        assert client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2).choices


def test_echo_with_a_choice_of_log_probabilities_as_a_stream(client: OpenAI) -> None:
    arguments: dict[str, Any] = {"model": MODEL, "prompt": ["What", "You are"], "max_tokens": 3, "temperature": 0}
    arguments |= {"echo": True, "logprobs": 1, "n": 2}
    whole = client.completions.create(**arguments).choices
    chunks = [chunk.choices[0] for chunk in client.completions.create(**arguments, stream=True)]
    for index, choice in enumerate(whole):
        mine = [chunk for chunk in chunks if chunk.index == index]
        assert "".join(chunk.text for chunk in mine) == choice.text
        assert choice.logprobs is not None and choice.logprobs.text_offset is not None
        offsets = [at for chunk in mine if chunk.logprobs for at in chunk.logprobs.text_offset or ()]
        assert offsets == choice.logprobs.text_offset


def test_log_probabilities_and_echo(client: OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="What is", max_tokens=4, temperature=0, logprobs=3, echo=True
    )
    choice = answer.choices[0]
    assert choice.text.startswith("What is")
    told = choice.logprobs
    assert told is not None and told.tokens and told.token_logprobs and told.top_logprobs and told.text_offset
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset)
    assert told.token_logprobs[0] is None
    for token, logprob, top in list(zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True))[-4:]:
        assert logprob == max(top.values()) == top[token]
    # each place of the prompt read again alone has the same distribution
    shorter = client.completions.create(model=MODEL, prompt="What i", max_tokens=0, logprobs=0, echo=True)
    assert shorter.choices[0].logprobs is not None and shorter.choices[0].logprobs.token_logprobs is not None
    assert len(shorter.choices[0].logprobs.token_logprobs) >= 2


def test_stops(client: OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt="You", max_tokens=30, temperature=0).choices[0].text
    stop = whole[9:12]
    for stream in (False, True):
        arguments: dict[str, Any] = {"model": MODEL, "prompt": "You", "max_tokens": 30, "temperature": 0, "stop": stop}
        if stream:
            chunks = list(client.completions.create(**arguments, stream=True))
            text, reason = "".join(c.choices[0].text for c in chunks), chunks[-1].choices[0].finish_reason
        else:
            choice = client.completions.create(**arguments).choices[0]
            text, reason = choice.text, choice.finish_reason
        assert (text, reason) == (whole[: whole.index(stop)], "stop")


def test_penalties_biases_and_cuts(client: OpenAI, server: HttpServer) -> None:
    def text(**options: Any) -> str:
        told = client.completions.create(model=MODEL, prompt="You", max_tokens=16, temperature=0, **options)
        return str(told.choices[0].text)

    held = server.served.tokenizer.encode("w", special=False)[0]
    assert text(logit_bias={str(held): 100}) == "w" * 16
    assert len(set(text(logit_bias={str(held): 40}, frequency_penalty=2, presence_penalty=2))) > 0
    plain = text()
    assert text(extra_body={"repetition_penalty": 5.0}) != plain
    assert text(extra_body={"top_k": 1, "min_p": 1.0}) == plain
    sampled: dict[str, Any] = {"model": MODEL, "prompt": "You", "max_tokens": 16, "temperature": 2, "seed": 3}
    one = client.completions.create(**sampled, extra_body={"min_p": 1.0}).choices[0].text
    assert one == plain  # only the likeliest is left


def test_a_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=CHAT, max_tokens=8, temperature=0, logprobs=True, top_logprobs=2, n=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    told = answer.choices[0].logprobs
    assert told is not None and told.content is not None and len(told.content) == 8
    for entry in told.content:
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0
        assert entry.bytes is not None and math.isfinite(entry.logprob)
    again = client.chat.completions.create(model=MODEL, messages=CHAT, max_completion_tokens=8, temperature=0)
    assert again.choices[0].message.content == answer.choices[0].message.content


def test_the_second_turn_of_a_chat_is_read_from_the_cache(client: OpenAI, server: HttpServer) -> None:
    words: list[Any] = [{"role": "user", "content": "A long question, " * 6}]
    first = client.chat.completions.create(model=MODEL, messages=words, max_tokens=4, temperature=0)
    again = client.chat.completions.create(model=MODEL, messages=words, max_tokens=4, temperature=0)
    assert first.usage is not None and again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert (again.usage.prompt_tokens_details.cached_tokens or 0) >= first.usage.prompt_tokens // 16 * 16 - 16
    assert again.choices[0].message == first.choices[0].message


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_json_that_fits_a_schema(client: OpenAI, temperature: float) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    answer = client.chat.completions.create(
        model=MODEL,
        messages=CHAT,
        response_format=form,
        temperature=temperature,
        seed=2,
        n=4,
        extra_body={"reasoning_budget": 2},
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content or ""), SCHEMA)
        assert cast("Any", choice.message).reasoning_content
    plain: Any = {"type": "json_object"}
    told = client.chat.completions.create(
        model=MODEL,
        messages=CHAT,
        response_format=plain,
        temperature=temperature,
        max_tokens=60,
        extra_body={"chat_template_kwargs": {"enable_thinking": False}},
    )
    assert (told.choices[0].message.content or "").lstrip().startswith("{")


class Person(BaseModel):
    age: int
    tall: bool


def test_the_clients_own_schemas_and_streams(client: OpenAI) -> None:
    """`parse` and `stream` insist on whole chunks."""
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    parsed = client.chat.completions.parse(
        model=MODEL, messages=CHAT, response_format=Person, temperature=0, extra_body=extra
    )
    assert isinstance(parsed.choices[0].message.parsed, Person)
    with client.chat.completions.stream(
        model=MODEL, messages=CHAT, response_format=Person, temperature=0, extra_body=extra
    ) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= set(events)
    assert final.choices[0].message.parsed == parsed.choices[0].message.parsed


def test_many_at_once_with_the_async_client(server: HttpServer, client: OpenAI) -> None:
    """More than there are rows: each gets what it gets alone."""
    prompts = [f"You are number {i}" for i in range(12)]
    expected = [
        client.completions.create(model=MODEL, prompt=p, max_tokens=10, temperature=0).choices[0].text for p in prompts
    ]

    async def ask() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def one(prompt: str, stream: bool) -> str:
                if not stream:
                    answer = await client.completions.create(model=MODEL, prompt=prompt, max_tokens=10, temperature=0)
                    return answer.choices[0].text
                chunks = await client.completions.create(
                    model=MODEL, prompt=prompt, max_tokens=10, temperature=0, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in chunks])

            return await asyncio.gather(*(one(prompt, i % 2 == 0) for i, prompt in enumerate(prompts)))

    assert asyncio.run(ask()) == expected
