"""Answers with reasoning and tool calls, by a stand-in that says them; the clients are others' code."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import openai
import pytest
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from n3c.runtime.serve.http_server import HttpServer
from n3c.runtime.serve.reasoning_text import ReasoningStream
from n3c.runtime.serve.tool_calls import Call, ToolCallStream, parse_call
from support.serving_http import TEMPLATE, listening, saying, scripted_served
from support.small_tokenizer import open_tokenizer, write_tokenizer

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "units": {"type": "object"}},
            "required": ["city"],
        },
    },
}
CALL = """<tool_call>
<function=weather>
<parameter=city>
Paris
</parameter>
<parameter=days>
3
</parameter>
</function>
</tool_call>"""
REASONED = f"I must look.\n</think>\n\nOne moment.\n{CALL}\n{CALL.replace('Paris', 'Rome')}"
ANSWER = "It rains there.\n</think>\n\nIt rains in Paris."
ASKED: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scripted")
    write_tokenizer(folder, TEMPLATE)
    return folder


@contextmanager
def saying_server(folder: Path, *answers: str) -> Generator[HttpServer]:
    with listening(scripted_served(folder, saying(open_tokenizer(folder), answers))) as server:
        yield server


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[HttpServer]:
    with saying_server(folder, REASONED, ANSWER) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: HttpServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_reasoning_calls_and_the_answer_to_their_results(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="small", messages=ASKED, tools=[WEATHER])
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert cast("Any", choice.message).reasoning_content == "I must look.\n"
    assert (choice.message.content or "").strip() == "One moment."
    calls = cast("Any", choice.message.tool_calls)
    assert [json.loads(call.function.arguments)["city"] for call in calls] == ["Paris", "Rome"]
    assert json.loads(calls[0].function.arguments) == {"city": "Paris", "days": 3}
    assert len({call.id for call in calls}) == 2
    assert answer.usage is not None and answer.usage.completion_tokens_details is not None
    assert 0 < (answer.usage.completion_tokens_details.reasoning_tokens or 0) < answer.usage.completion_tokens
    told: list[Any] = [*ASKED, choice.message.model_dump(exclude_none=True)]
    told += [{"role": "tool", "tool_call_id": call.id, "content": "rain"} for call in calls]
    final = client.chat.completions.create(model="small", messages=told, tools=[WEATHER])
    assert final.choices[0].finish_reason == "stop"
    assert (final.choices[0].message.content or "").strip() == "It rains in Paris."


def test_the_same_as_a_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="small", messages=ASKED, tools=[WEATHER]) as stream:
        for _ in stream:
            pass
        message = stream.get_final_completion().choices[0].message
    assert [call.function.name for call in message.tool_calls or ()] == ["weather", "weather"]
    chunks = list(client.chat.completions.create(model="small", messages=ASKED, tools=[WEATHER], stream=True))
    deltas: list[Any] = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "I must look.\n"
    assert [call.index for delta in deltas for call in delta.tool_calls or ()] == [0, 1]
    assert "<" not in "".join(delta.content or "" for delta in deltas)


def test_without_tools_their_text_is_text(client: openai.OpenAI) -> None:
    for options in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        message = (
            client.chat.completions.create(model="small", messages=ASKED, **cast("Any", options)).choices[0].message
        )
        assert not message.tool_calls and "<function=weather>" in (message.content or "")


def test_the_reasoning_budget(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="small", messages=ASKED, max_tokens=6, extra_body={"reasoning_budget": 3}
    )
    assert answer.usage is not None and answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens == 4  # and the tag that is forced


UNICODE = "naïve café: 日本語 and 🙂🙃, e\u0301 done"


@pytest.mark.parametrize("stop", ["café", "é", "本語", "語 and", "🙃", "🙂🙃, e\u0301", "\u0301", "done", ["zz", "日"]])
def test_stops_of_any_character_over_the_borders_of_tokens(folder: Path, stop: str | list[str]) -> None:
    """Each of these characters is several tokens, and drafts bring more than one token a round."""
    expected = min(UNICODE.split(each)[0] for each in ([stop] if isinstance(stop, str) else stop) if each in UNICODE)
    with saying_server(folder, f"</think>{UNICODE}") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        choice = client.chat.completions.create(model="small", messages=ASKED, stop=stop).choices[0]
        chunks = list(client.chat.completions.create(model="small", messages=ASKED, stop=stop, stream=True))
    assert (choice.message.content, choice.finish_reason) == (expected, "stop")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


@tool
def weather(city: str) -> str:
    """Return the weather in a city."""
    return f"rain in {city}"


def test_langchain(server: HttpServer) -> None:
    """A second client, with tools of its own and a stream."""
    model = ChatOpenAI(
        base_url=f"{server.url}/v1", api_key=SecretStr("none"), model="small", max_retries=0, stream_usage=True
    )
    bound = model.bind_tools([weather])
    message = bound.invoke("What is the weather in Paris?")
    assert [call["args"]["city"] for call in cast("Any", message).tool_calls] == ["Paris", "Rome"]
    streamed: Any = None
    for chunk in bound.stream("What is the weather in Paris?"):
        streamed = chunk if streamed is None else streamed + chunk
    assert [call["name"] for call in streamed.tool_calls] == ["weather", "weather"]
    assert streamed.usage_metadata["output_tokens"] > 0


SCHEMAS = {"f": {"properties": {"s": {"type": "string"}, "n": {"type": "integer"}}}}


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("<function=f></function>", {}),
        ("<function=f><parameter=s>1</parameter></function>", {"s": "1"}),
        (
            "\n<function=f>\n<parameter=s>\na\n\nb\n</parameter>\n<parameter=n>\n7\n</parameter>\n</function>\n",
            {"s": "a\n\nb", "n": 7},
        ),
        ("<function=f><parameter=n>seven</parameter></function>", {"n": "seven"}),
        ("<function=f><parameter=o>\n{\"a\": [1]}\n</parameter></function>", {"o": {"a": [1]}}),
        ("<function=f><parameter=s>\n</function>\n</parameter></function>", {"s": "</function>"}),
        ("<function=g></function>", None),
        ("<function=f><parameter=s>1</function>", None),
        ("<function=f>text<parameter=s>1</parameter></function>", None),
        ("{\"name\": \"f\"}", None),
        ("<function=f>", None),
    ],
)  # fmt: skip
def test_calls(text: str, arguments: dict[str, object] | None) -> None:
    call = parse_call(text, SCHEMAS)
    assert (None if call is None else json.loads(call.arguments)) == arguments


@pytest.mark.parametrize("step", range(1, 40, 3))
def test_a_stream_is_cut_anywhere(step: int) -> None:
    text = "Look: <tool_call>\n<function=f>\n<parameter=s>\n<b>\n</parameter>\n</function>\n</tool_call> and <tool_cal"
    stream, found = ToolCallStream(SCHEMAS), list[str | Call]()
    for at in range(0, len(text), step):
        found += stream.feed(text[at : at + step])
    texts = "".join(each for each in found if isinstance(each, str)) + stream.finish()
    assert texts == "Look: and <tool_cal"  # white space before a call is not text
    assert [each.arguments for each in found if isinstance(each, Call)] == ['{"s": "<b>"}']


@pytest.mark.parametrize(
    ("inside", "text", "expected"),
    [
        (True, "abc</think>def", ("abc", "def")),
        (True, "abc</thi", ("abc</thi", "")),
        (True, "a</think>b</think>", ("a", "b</think>")),
        (False, "<think>abc</think>def", ("abc", "def")),
        (False, "<thin", ("", "<thin")),
        (False, "a<think>b", ("", "a<think>b")),
        (True, "", ("", "")),
    ],
)
@pytest.mark.parametrize("step", [1, 2, 5, 99])
def test_reasoning_apart(inside: bool, text: str, expected: tuple[str, str], step: int) -> None:
    stream = ReasoningStream(inside)
    pieces = [stream.feed(text[at : at + step]) for at in range(0, len(text), step)] + [stream.finish()]
    assert ("".join(first for first, _ in pieces), "".join(second for _, second in pieces)) == expected
