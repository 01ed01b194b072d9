"""Conversations of train.py: as transformers writes them, with a loss on what the assistant says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from .data_files import make_tokenizer, program, settings_of

PLAIN = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TAGGED = (
    "{%- if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif -%}"
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{%- else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor -%}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Thoughts of turns before the last question are left out, as Nemotron's and Qwen's templates do.
THINKING = (
    "{%- set at = namespace(last=0) %}{% for message in messages %}"
    "{%- if message.role == 'user' %}{% set at.last = loop.index0 %}{% endif %}{% endfor %}"
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.reasoning_content and loop.index0 > at.last %}"
    "{{ '<think>' + message.reasoning_content + '</think>' }}{% endif %}"
    "{{ message.content + '<|im_end|>\n' }}{% endfor -%}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "the quick dog?"}, {"role": "assistant", "content": "over the lazy fox."}],
    [
        {"role": "system", "content": "brown"},
        {"role": "user", "content": "one, 東京"},
        {"role": "assistant", "content": "Grüße!", "reasoning_content": "lazy"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "jumps"},
        {"role": "user", "content": "nobody answers"},
    ],
]
TOOLS = [{"type": "function", "function": {"name": "jump", "parameters": {}}}]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with program(tmp_path_factory.mktemp("train")) as modules:
        yield modules


def tokenizer_of(folder: Path, template: str) -> Any:
    """Write a tokenizer with a chat template; return transformers' own."""
    make_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(template, "utf-8")
    return PreTrainedTokenizerFast.from_pretrained(folder)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write conversations in the form that the name says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


def opened(train: Any, data: Path, tokenizer: Path, out: Path) -> list[tuple[list[int], list[int]]]:
    """Return of each document its tokens, and those of them that the loss counts."""
    given = ["--tokenizer", str(tokenizer), "--messages-field", "messages"]
    tokens = train.sources.open_tokens(data, settings_of(train, data, out, *given))
    bounds = [0, *tokens.ends.tolist()]
    windows = [tokens.window(start, end - start) for start, end in pairwise(bounds)]
    return [(w.ids.tolist(), w.labels[w.labels != -100].tolist()) for w in windows]


@pytest.mark.parametrize("name", ["chats.jsonl", "chats.parquet", "chats"])
def test_generation_tags(train: Any, tmp_path: Path, name: str) -> None:
    """Tokens and mask are transformers'; a table's missing fields are none, as they are in JSON."""
    theirs = tokenizer_of(tmp_path / "tokenizer", TAGGED)
    rows = [{"messages": chat, "tools": json.dumps(TOOLS)} for chat in CHATS]
    documents = opened(train, write(tmp_path / name, rows), tmp_path / "tokenizer", tmp_path)
    assert len(documents) == len(CHATS)
    for chat, (ids, counted) in zip(CHATS, documents, strict=True):
        out = theirs.apply_chat_template(chat, tools=TOOLS, return_dict=True, return_assistant_tokens_mask=True)
        assert ids == out["input_ids"]
        masked = [i for i, of_it in zip(out["input_ids"], out["assistant_masks"], strict=True) if of_it]
        assert counted == masked and 0 < len(counted) < len(ids)


def test_differences_of_prompts(train: Any, tmp_path: Path) -> None:
    """Without tags, what comes after the prompt that asks for it; what nobody answers is left out."""
    theirs = tokenizer_of(tmp_path / "tokenizer", PLAIN)
    rows = [{"messages": chat} for chat in CHATS]
    documents = opened(train, write(tmp_path / "chats.jsonl", rows), tmp_path / "tokenizer", tmp_path)
    assert [theirs.decode(ids) for ids, _ in documents] == [
        theirs.apply_chat_template(chat, tokenize=False) for chat in (CHATS[0], CHATS[1][:-1])
    ]
    said = [theirs.decode(counted) for _, counted in documents]
    assert said == ["over the lazy fox.<|im_end|>\n", "Grüße!<|im_end|>\njumps<|im_end|>\n"]


def test_templates_that_forget(train: Any, tmp_path: Path) -> None:
    """A turn that is written otherwise later on is a document of its own, as the model will see it."""
    theirs = tokenizer_of(tmp_path / "tokenizer", THINKING)
    data = write(tmp_path / "chats.jsonl", [{"messages": CHATS[1]}])
    documents = opened(train, data, tmp_path / "tokenizer", tmp_path)
    assert [theirs.decode(ids) for ids, _ in documents] == [
        theirs.apply_chat_template(CHATS[1][:count], tokenize=False) for count in (3, 5)
    ]
    said = [theirs.decode(counted) for _, counted in documents]
    assert said == ["<think>lazy</think>Grüße!<|im_end|>\n", "jumps<|im_end|>\n"]


def template_of(train: Any, source: str) -> Any:
    return train.chat.ChatTemplate(source, {"eos_token": "</s>"}, "a folder")


BARE = "{% for message in messages %}[{{ message.role }}: {{ message.content }}]{% endfor %}"


def test_a_template_without_a_prompt_for_answers(train: Any) -> None:
    """What the assistant says begins where the turns before it end; also where it says the first word."""
    for chat, spans in (
        ([("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")], ["[assistant: b]", "[assistant: d]"]),
        ([("assistant", "b"), ("user", "c")], ["[assistant: b]"]),
        ([("user", "a")], []),
        ([], []),
    ):
        messages = [{"role": role, "content": content} for role, content in chat]
        found = list(template_of(train, BARE).documents(messages, None))
        assert [text[start:end] for text, of_text in found for start, end in of_text] == spans
        assert len(found) == bool(spans)


def test_a_template_that_changes_what_it_wrote(train: Any) -> None:
    """Where no difference of prompts is what the assistant says, that is told, with the message."""
    messages = [{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")]
    counting = template_of(train, "{{ messages | length }}" + BARE)
    with pytest.raises(ValueError, match=r"^message 2 changes what the template writes of those before it; it needs"):
        list(counting.documents(messages, None))


def test_templates_are_written_as_transformers_does(train: Any, tmp_path: Path) -> None:
    """Blocks take their line with them; JSON is not escaped; what a template is given."""
    source = (
        "{{ eos_token }}\n  {% if tools %}\n  {{ tools | tojson }}{{ tools | tojson(indent=2) }}\n  {% endif %}\n"
        "{% for message in messages %}\n  {% if loop.first %}\n{{ message.content }}\n  {% endif %}\n"
        "{% if message.role == 'stop' %}{% break %}{% endif %}{{ message.role }}\n  {% endfor %}\n"
        "{% set found = namespace(last=documents) %}{{ found.last is none }}{{ dict(a=1)['a'] }}"
        "{{ strftime_now('%Y') | length }}{{ add_generation_prompt }}"
    )
    theirs = tokenizer_of(tmp_path / "tokenizer", source)
    messages = [{"role": role, "content": f"<{role}> & 東京"} for role in ("user", "assistant", "stop", "user")]
    tools = [{"type": "function", "function": {"name": "grüßen", "description": "<'>", "parameters": {}}}]
    for given in (tools, None):
        expected = theirs.apply_chat_template(messages, tools=given, tokenize=False)
        assert template_of(train, source).render(messages, given) == expected


def test_the_loss_is_the_assistants(train: Any, tmp_path: Path) -> None:
    """A step's loss is the mean over the assistant's tokens, each document by itself."""
    tokenizer_of(tmp_path / "tokenizer", PLAIN)
    data = write(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS * 8])
    given = ["--data", str(data), "--out", str(tmp_path / "out"), "--steps", "1", "--batch-size", "3"]
    given += ["--seq-len", "64", "--val-every", "0", "--accumulation", "3"]
    given += ["--tokenizer", str(tmp_path / "tokenizer"), "--messages-field", "messages"]
    assert train.train.main(given) == 0
    line = json.loads((tmp_path / "out" / "metrics.jsonl").read_text())
    settings = train.settings.parse_settings("", given)
    model = train.weights.build_model(settings, train.world.World(0, 1, torch.device("cpu")), None)
    mixture, _ = train.data.open_data(settings)
    losses: list[torch.Tensor] = []
    for number in range(3):
        window = mixture.shuffled(number)
        for document in window.documents.unique():
            own = window.documents == document
            ids, labels = window.ids[own], window.labels[own][1:]
            counted = labels != -100
            scores = model(ids[None]).logits[0, :-1].log_softmax(-1)
            losses += [-scores[counted].gather(1, labels[counted, None])]
    assert line["loss"] == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "there is no messages, but text: --messages-field names the field"),
        ({"messages": "hello"}, "messages is no list of messages, but str"),
        ({"messages": [{"from": "human", "value": "x"}]}, "a message has no role: it is {role, content}"),
        ({"messages": [{"role": "assistant"}]}, "the chat template says: 'dict object' has no attribute 'content'"),
        ({"messages": [{"role": "user", "content": "stop"}, *CHATS[0]]}, "the chat template says: roles alternate"),
    ],
)
def test_bad_conversations(train: Any, tmp_path: Path, row: dict[str, Any], message: str) -> None:
    alternate = (
        "{% for message in messages %}{% if loop.index0 and message.role == messages[loop.index0 - 1].role %}"
        "{{ raise_exception('roles alternate') }}{% endif %}{{ message.role + message['content'] }}{% endfor %}"
    )
    tokenizer_of(tmp_path / "tokenizer", alternate)
    data = write(tmp_path / "chats.jsonl", [row])
    with pytest.raises(train.settings.TrainError) as error:
        opened(train, data, tmp_path / "tokenizer", tmp_path)
    assert str(error.value) == f"{data}, row 1: {message}"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ dict.__init__.__globals__ }}",
        "{{ namespace(__class__=1) }}",
        "{{ namespace({'__class__': 1}) }}",
        "{% set x = namespace() %}{% set x.__class__ = 1 %}",
        "{{ cycler.__init__.__globals__.os.popen('touch x').read() }}",
        "{% for i in range(1000000000) %}{% endfor %}",
    ],
)
def test_hostile_templates(train: Any, tmp_path: Path, template: str) -> None:
    """They run in jinja2's sandbox."""
    tokenizer_of(tmp_path / "tokenizer", template + "{% generation %}{% endgeneration %}")
    data = write(tmp_path / "chats.jsonl", [{"messages": CHATS[0]}])
    with pytest.raises(train.settings.TrainError, match=r"row 1: the chat template says: |holds no tokens"):
        opened(train, data, tmp_path / "tokenizer", tmp_path)


def test_where_templates_are(train: Any, tmp_path: Path) -> None:
    """Also in tokenizer_config.json, alone or of several; without one there are no conversations."""
    data = write(tmp_path / "chats.jsonl", [{"messages": CHATS[0]}])
    expected = None
    for number, template in enumerate((PLAIN, [{"name": "default", "template": PLAIN}], [{"name": "rag"}], "{% if")):
        make_tokenizer(tmp_path / str(number), chat_template=template)
        if number < 2:
            found = opened(train, data, tmp_path / str(number), tmp_path)
            assert found == (expected := expected or found)
            continue
        with pytest.raises(train.settings.TrainError, match=r"neither chat_template\.jinja nor|the chat template of"):
            opened(train, data, tmp_path / str(number), tmp_path)


def test_conversations_need_fields_and_a_template(train: Any, tmp_path: Path) -> None:
    tokenizer_of(tmp_path / "tokenizer", PLAIN)
    (tmp_path / "chat.txt").write_text("text")
    with pytest.raises(train.settings.TrainError, match="--messages-field needs JSON lines, Parquet or Arrow"):
        opened(train, tmp_path / "chat.txt", tmp_path / "tokenizer", tmp_path)
