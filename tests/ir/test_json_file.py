"""The bounded reader of JSON: what takes too much memory or says things twice is refused before it costs anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from n3c.ir.json_file import JsonError, JsonSyntaxError, is_count, parse_json, read_json


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "it is not JSON"),
        (b"\xff", "it is not JSON"),
        (b"9" * 5000, "it is not JSON"),
        (b"[" * 100_000, "it nests too deeply"),
        (b'{"a": {"b": 1, "b": 2}}', "it has `b` twice"),
    ],
)
def test_what_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(JsonError) as caught:
        parse_json(text)
    assert str(caught.value) == message


def test_the_number_of_values() -> None:
    assert parse_json(b'[{"a": 1}, 2, []]', 5) == [{"a": 1}, 2, []]  # 3 brackets and 2 commas
    for text in (b"[1,2,3,4,5,6]", b"[[[[[[]]]]]]", b'{"a":{},"b":{},"c":{}}'):
        with pytest.raises(JsonError, match="more than 5 values"):
            parse_json(text, 5)


def test_where_it_stops_being_json() -> None:
    with pytest.raises(JsonSyntaxError) as caught:
        parse_json('{"ä": 1,, "b": 2}')
    assert (caught.value.position, str(caught.value)) == (8, "it is not JSON")
    assert caught.value.reason.startswith("expecting property name")


def test_a_pointer_is_named() -> None:
    for text in (b"version https://git-lfs.github.com/spec/v1\n", "version https://git-lfs.github.com/spec/v1\n"):
        with pytest.raises(JsonError, match="Git LFS pointer"):
            parse_json(text)


def test_sizes(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"[1]")
    assert read_json(path, 3) == [1]
    with pytest.raises(JsonError, match="larger than 2 bytes"):
        read_json(path, 2)


def test_counts() -> None:
    assert is_count(0) and is_count(7, 7)
    assert not any(is_count(value) for value in (-1, 1.0, True, "1", None, 1 << 63))
    assert not is_count(8, 7)
