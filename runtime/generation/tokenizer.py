"""Text and token ids: the checkpoint's tokenizer.json, or bytes for byte-level specs."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Span
from n3c.ir.json_file import read_bounded

FILE = "tokenizer.json"
_MAX_BYTES = 1 << 28
"""Largest tokenizer.json; those of released models are a tenth of it."""
BYTES = 256
"""The vocabulary of a byte-level spec."""


class Stream(Protocol):
    """Ids in, text out, piece by piece; all pieces joined are the text of all ids."""

    def feed(self, ids: Sequence[int]) -> str:
        """Return the text that is certain now: a character that may go on in the next token is kept back."""
        ...

    def finish(self) -> str:
        """Return what was kept back."""
        ...


class Tokenizer(Protocol):
    """Text to ids and back."""

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the ids of `text`, with the tokens that begin a prompt if `special`."""
        ...

    def encode_plain(self, text: str) -> list[int]:
        """Return the ids of `text`, in which nothing is an added token, and nothing begins a prompt."""
        ...

    @property
    def added(self) -> Mapping[str, bool]:
        """The tokens added to the vocabulary, as written → whether it is a special one."""
        ...

    def stream(self) -> Stream:
        """Return a decoder of one sequence, which leaves special tokens out."""
        ...

    def special(self, token: int) -> str | None:
        """Return how a special token is written, as `</think>`; None for every other token."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """Return what a token stands for in UTF-8, which may be a part of a character."""
        ...


def decoded(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return the text of `ids`."""
    stream = tokenizer.stream()
    return stream.feed(ids) + stream.finish()


class ByteTokenizer:
    """Ids are the bytes of UTF-8."""

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the bytes of `text`; there are no special tokens."""
        return list(text.encode("utf-8", errors="surrogateescape"))

    def encode_plain(self, text: str) -> list[int]:
        """Return the bytes of `text`."""
        return self.encode(text)

    @property
    def added(self) -> Mapping[str, bool]:
        """None."""
        return {}

    def stream(self) -> Stream:
        """Return a decoder in which bytes that are no UTF-8 become U+FFFD."""
        return _ByteStream()

    def special(self, token: int) -> str | None:
        """Return None: every token is a byte."""
        return None

    def token_bytes(self, token: int) -> bytes:
        """Return the byte."""
        return bytes([token])


class _ByteStream:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: Sequence[int]) -> str:
        return self._decoder.decode(bytes(ids))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class FileTokenizer:
    """A tokenizer.json, by the `tokenizers` library."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added: dict[int, Any] = tokenizer.get_added_tokens_decoder()
        self._special: dict[int, str] = {token: entry.content for token, entry in added.items() if entry.special}
        self.added: Mapping[str, bool] = {entry.content: entry.special for entry in added.values()}

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the ids of `text`."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special).ids
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Return the ids of `text` by the steps of the tokenizer but the first, which finds added tokens."""
        normalizer, splitter = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer
        if normalizer is not None:
            text = normalizer.normalize_str(text)
        pieces = [text] if splitter is None else [piece for piece, _ in splitter.pre_tokenize_str(text)]
        return [token.id for piece in pieces for token in self._tokenizer.model.tokenize(piece)]

    def stream(self) -> Stream:
        """Return a decoder that leaves special tokens out."""
        return _FileStream(self._tokenizer)

    def special(self, token: int) -> str | None:
        """Return the content of a token that tokenizer.json calls special."""
        return self._special.get(token)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of a token, of a byte-level tokenizer by its alphabet."""
        content: str | None = self._tokenizer.id_to_token(token)
        if content is None:
            return b""
        if content not in self.added and type(self._tokenizer.decoder).__name__ == "ByteLevel":
            return bytes(_BYTE_LEVEL.get(character, 0x3F) for character in content)
        text: str = self._tokenizer.decode([token], skip_special_tokens=False)
        return text.encode()


def _byte_level() -> dict[str, int]:
    """Return the alphabet of byte-level BPE (GPT-2): visible characters stand for themselves, others for U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level()


class _FileStream:
    """Decodes a window that begins at a token whose text was certain, so that spaces between words come out right."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._told = 0
        """Ids at the start of the window whose text has been returned."""

    def feed(self, ids: Sequence[int]) -> str:
        self._window.extend(ids)
        text = self._decode(self._window)
        if text.endswith("\ufffd"):  # the first bytes of a character, most likely
            return ""
        piece = text[len(self._decode(self._window[: self._told])) :]
        self._window = self._window[self._told :]
        self._told = len(self._window)
        return piece

    def finish(self) -> str:
        piece = self._decode(self._window)[len(self._decode(self._window[: self._told])) :]
        self._window, self._told = [], 0
        return piece

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


def find_tokenizer(directories: Sequence[Path], vocab_size: int) -> Tokenizer | None:
    """Return the tokenizer of the first directory that has one, else bytes where the vocabulary is bytes, else None.

    Raises N3CError (exit code 6) for a tokenizer.json that is none, or that knows more tokens than the model.
    """
    for directory in directories:
        path = directory / FILE
        if path.is_file():
            return _read(path, vocab_size)
    return ByteTokenizer() if vocab_size == BYTES else None


def _read(path: Path, vocab_size: int) -> FileTokenizer:
    from tokenizers import Tokenizer as Library

    try:
        tokenizer: Any = Library.from_str(read_bounded(path, _MAX_BYTES).decode("utf-8"))
        size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        found = FileTokenizer(tokenizer)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises nothing narrower; where its parser panics, not even Exception
        raise _unusable(path, f"not a tokenizer: {error}") from error
    if size > vocab_size:
        raise _unusable(path, f"the tokenizer has {size:,} tokens, the model {vocab_size:,}")
    return found


def _unusable(path: Path, message: str) -> N3CError:
    help_ = "put the tokenizer.json of this model there, or remove it and give --prompt-ids"
    return N3CError(Diagnostic("E0805", message, Span(str(path)), help=help_), ExitCode.FILE)
