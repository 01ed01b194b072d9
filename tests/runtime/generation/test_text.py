"""Text that grows: characters of several tokens, stop strings across tokens."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from n3c.ir.diagnostics import ExitCode, N3CError
from n3c.runtime.generation.text import GrowingText
from n3c.runtime.generation.tokenizer import ByteTokenizer, FileTokenizer, decoded, find_tokenizer

SAMPLE = "def naïve(x):\n    return 'größe → 漢字' + x  # 🙂 and so on\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer as language models have, with a special token."""
    tokenizer = Library(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>", "</think>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([SAMPLE] * 4, trainer)
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.mark.parametrize("kind", ["bytes", "file"])
def test_pieces_are_the_text(kind: str, folder: Path) -> None:
    tokenizer = find_tokenizer([folder] if kind == "file" else [], 400 if kind == "file" else 256)
    assert isinstance(tokenizer, FileTokenizer if kind == "file" else ByteTokenizer)
    ids = tokenizer.encode(SAMPLE)
    growing = GrowingText(tokenizer)
    pieces = [growing.feed(token) for token in ids]
    assert "".join(pieces) + growing.finish() == SAMPLE == growing.text == decoded(tokenizer, ids)
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(ids) < len(SAMPLE.encode()) or kind == "bytes"


def test_special_tokens_are_not_text(folder: Path) -> None:
    tokenizer = find_tokenizer([folder], 400)
    assert tokenizer is not None
    (eos,) = tokenizer.encode("<eos>")
    assert decoded(tokenizer, [*tokenizer.encode("ab"), eos]) == "ab"


@pytest.mark.parametrize("stop", ["</think>", "</think>ok", "b</thi", "ab</think>o"])
def test_a_stop_string_may_hold_a_special_token(folder: Path, stop: str) -> None:
    """`</think>` is one special token: no text, but a stop string sees it."""
    tokenizer = find_tokenizer([folder], 400)
    assert tokenizer is not None
    ids = tokenizer.encode("xab</think>okay")
    assert len(tokenizer.encode("</think>")) == 1
    growing, shown = GrowingText(tokenizer, [stop]), ""
    for token in ids:
        shown += growing.feed(token)
    assert growing.stopped
    assert shown == growing.text == "xab</think>okay".partition(stop)[0].replace("</think>", "")


def test_special_tokens_that_only_began_like_a_stop_string_are_not_shown(folder: Path) -> None:
    tokenizer = find_tokenizer([folder], 400)
    assert tokenizer is not None
    growing = GrowingText(tokenizer, ["b</think>!"])
    shown = "".join(growing.feed(token) for token in tokenizer.encode("ab</think>")) + growing.finish()
    assert (shown, growing.text, growing.stopped) == ("ab", "ab", False)


def test_bytes_that_are_no_text_are_marked() -> None:
    growing = GrowingText(ByteTokenizer())
    assert [growing.feed(token) for token in (65, 0xE2, 66)] == ["A", "", "\ufffdB"]
    growing.feed(0xE2)
    assert growing.finish() == "\ufffd"
    assert growing.text == "A\ufffdB\ufffd"


def test_a_stop_string_across_tokens_is_never_shown() -> None:
    growing = GrowingText(ByteTokenizer(), ["END", "\n\n"])
    shown = [growing.feed(token) for token in b"an ENx EEND of it"]
    assert "".join(shown) == growing.text == "an ENx E"
    assert growing.stopped
    assert growing.finish() == ""


def test_what_only_began_like_a_stop_string_is_shown_at_the_end() -> None:
    growing = GrowingText(ByteTokenizer(), ["END"])
    assert [growing.feed(token) for token in b"aEN"] == ["a", "", ""]
    assert growing.finish() == "EN"
    assert (growing.text, growing.stopped) == ("aEN", False)


@settings(suppress_health_check=[HealthCheck.too_slow])  # of the first few where the machine is busy
@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stopping_is_at_the_first_occurrence(text: str, stops: list[str]) -> None:
    growing, shown = GrowingText(ByteTokenizer(), stops), ""
    for token in text.encode():
        shown += growing.feed(token)
        if growing.stopped:
            break
    shown += growing.finish()
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    read = text[: min(ends)] if ends else text  # tokens come one by one: the stop that is complete first
    expected = min((read.find(stop) for stop in stops if stop in read), default=len(read))
    assert (shown, growing.stopped) == (text[:expected], bool(ends))


def test_tokenizers_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    assert find_tokenizer([tmp_path], 400) is None
    with pytest.raises(N3CError, match="has 300 tokens, the model 97") as error:
        find_tokenizer([folder], 97)
    assert error.value.exit_code == ExitCode.FILE
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(N3CError, match=r"E0805.*not a tokenizer"):
        find_tokenizer([tmp_path], 400)


def test_a_tokenizer_whose_parser_panics_is_no_tokenizer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Rust raises where it panics is no Exception; Ctrl-C goes on as such."""

    class PanicException(BaseException):
        pass

    raised: list[type[BaseException]] = [PanicException]

    def panics(_: str) -> object:
        raise raised[0]("index out of bounds")

    monkeypatch.setattr("tokenizers.Tokenizer", SimpleNamespace(from_str=panics))
    with pytest.raises(N3CError) as caught:
        find_tokenizer([folder], 400)
    assert (caught.value.exit_code, caught.value.diagnostics[0].code) == (ExitCode.FILE, "E0805")
    raised[0] = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        find_tokenizer([folder], 400)
