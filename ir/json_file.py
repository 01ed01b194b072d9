"""JSON that a program wrote, read with nothing taken on trust: no larger than it should be, every key once.

Whoever reads decides which code an error gets, and checks types and values.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

MAX_BYTES = 64 << 20
"""Largest file of most kinds; the index of a 550B checkpoint is below it."""


MAX_VALUES = 1 << 22
"""Most values of a text: those in the header of a 550B checkpoint in one file are half of it. They take 300 MB."""


class JsonError(ValueError):
    """A text that is not what it should be; the message goes on from "it" or "not readable:"."""


class JsonSyntaxError(JsonError):
    """A text that stops being JSON at character `position`, for `reason`."""

    def __init__(self, reason: str, position: int) -> None:
        super().__init__("it is not JSON")
        self.reason = reason
        self.position = position


class DuplicateKeyError(JsonError):
    """A text of JSON that gives a key twice."""


def read_json(path: Path, most: int = MAX_BYTES) -> object:
    """Return what a file says; JsonError where it is no JSON or larger than `most` bytes, OSError as `open`."""
    return parse_json(read_bounded(path, most))


def read_bounded(path: Path, most: int) -> bytes:
    """Return the bytes of a file; JsonError where it has more than `most`, endless and sparse ones too."""
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise JsonError(f"it is larger than {most:,} bytes")
    return data


LFS_POINTER = "a Git LFS pointer, not the file itself, which `git lfs pull` or `hf download` fetches"


def is_lfs_pointer(text: bytes | str) -> bool:
    """Whether a file that begins so stands for one that was not downloaded."""
    start = "version https://git-lfs"
    return text.startswith(start) if isinstance(text, str) else text.startswith(start.encode())


def is_lfs_file(path: Path) -> bool:
    """Whether the file at `path` is such a pointer; OSError as `open`."""
    with path.open("rb") as file:
        return is_lfs_pointer(file.read(64))


def parse_json(text: bytes | str, most: int = MAX_VALUES) -> object:
    """Return what a text, of UTF-8 as bytes, says.

    JsonError where it is no JSON, nests too deeply, has more than `most` values, or a key twice (`DuplicateKeyError`).
    """
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        if sum(map(decoded.count, "[{,")) > most:  # a few characters can be an object of a hundred bytes
            raise JsonError(f"it has more than {most:,} values")
        data: object = json.loads(decoded, object_pairs_hook=_once)
    except JsonError:
        raise
    except RecursionError:
        raise JsonError("it nests too deeply") from None
    except ValueError as error:  # no UTF-8, and numbers of thousands of digits, too
        if is_lfs_pointer(text):
            raise JsonError(f"it is {LFS_POINTER}") from error
        if isinstance(error, json.JSONDecodeError):
            raise JsonSyntaxError(error.msg[:1].lower() + error.msg[1:], error.pos) from error
        raise JsonError("it is not JSON") from error
    return data


def _once(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise DuplicateKeyError(f"it has `{twice[:200]}` twice")
    return found


def is_count(value: object, most: int = 1 << 62) -> bool:
    """Whether `value` is a whole number from 0 to `most`; True and False are none."""
    return type(value) is int and 0 <= value <= most
