"""Prompts, chats and thinking tags as token ids: with what a checkpoint has beside its weights, and without."""

from __future__ import annotations

from pathlib import Path

import pytest

from n3c.ir.diagnostics import ExitCode, N3CError
from n3c.runtime.generation.prompts import encoded, encoded_chat, parse_ids, tag_ids
from support.small_tokenizer import open_tokenizer, write_tokenizer


@pytest.mark.parametrize(
    ("text", "ids"),
    [("1", [1]), (" 12 ,\t3 ", [12, 3]), ("999999999999", [999999999999]), ("1000000000000", None), ("1,", None),
     ("1 2", None), ("-1", None), ("a", None), ("", None)],
)  # fmt: skip
def test_ids_or_text(text: str, ids: list[int] | None) -> None:
    assert parse_ids(text) == ids


def test_a_chat_is_what_the_template_makes_of_it(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "User: {{ messages[0].content }} Answer:")
    tokenizer = open_tokenizer(tmp_path)
    ids = encoded_chat("hello", tokenizer, tmp_path, parse_special=False)
    assert ids == encoded("User: hello Answer:", tokenizer, tmp_path, parse_special=False)
    with pytest.raises(N3CError, match="E0805") as caught:
        encoded_chat("hello", None, tmp_path, parse_special=False)
    assert caught.value.exit_code == ExitCode.FILE


def test_a_chat_needs_a_template(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    with pytest.raises(N3CError, match=r"E0840.*no chat template") as caught:
        encoded_chat("hello", open_tokenizer(tmp_path), tmp_path, parse_special=False)
    assert caught.value.exit_code == ExitCode.USAGE


def test_thinking_tags_are_ids_or_text(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = open_tokenizer(tmp_path)
    tags = tag_ids(("3,4", "a"), tokenizer, tmp_path)
    assert (tags.start, tags.end) == ((3, 4), tuple(tokenizer.encode("a", special=False)))
    assert tag_ids(("3,4", "5"), None, tmp_path).end == (5,)
    for empty in (("", "5"), ("5", "")):
        with pytest.raises(N3CError, match="E0811") as caught:
            tag_ids(empty, tokenizer, tmp_path)
        assert caught.value.exit_code == ExitCode.USAGE
