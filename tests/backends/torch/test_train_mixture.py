"""Mixtures of train.py's data: weights, order, epochs, processes, going on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from .data_files import DOCUMENTS, make_tokenizer, program, settings_of


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with program(tmp_path_factory.mktemp("train")) as modules:
        yield modules


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """Return a mixture of files whose tokens tell which they are of, and at which place."""
    for number, windows in enumerate((10, 5, 40)):
        np.save(tmp_path / f"{number}.npy", np.repeat(np.arange(windows), 16) + 100 * number)
    tables = [f'[[source]]\npath = "{tmp_path}/{n}.npy"\nweight = {w}\n' for n, w in enumerate((5, 2.5, 2))]
    path = tmp_path / "mixture.toml"
    path.write_text("".join(tables))
    return path


def sequences(data: Any, count: int) -> list[tuple[int, int]]:
    """Return of the first sequences of a run the source and the place of their last token."""
    return [divmod(int(data.shuffled(n).ids[-1]), 100) for n in range(count)]


def test_weights_and_epochs(train: Any, mixture: Path, tmp_path: Path) -> None:
    """A block has each source's part exactly, in an order of its own; a source's windows come round by round."""
    data, _ = train.data.open_data(settings_of(train, mixture, tmp_path))
    read = sequences(data, 20_000)
    for block in (read[:10_000], read[10_000:]):
        assert Counter(source for source, _ in block) == {0: 5263, 1: 2632, 2: 2105}
    assert [source for source, _ in read[:10_000]] != [source for source, _ in read[10_000:]]
    head = Counter(source for source, _ in read[:1000])
    assert all(abs(head[source] / 1000 - share) < 0.05 for source, share in enumerate((0.53, 0.26, 0.21)))
    for source, windows in ((0, 10), (1, 5), (2, 40)):
        places = [place for of, place in read if of == source]
        for epoch in range(3):
            assert sorted(places[epoch * windows : (epoch + 1) * windows]) == list(range(windows))


def test_any_sequence_at_once(train: Any, mixture: Path, tmp_path: Path) -> None:
    """What a run reads follows from the number alone: no process and no going on changes it."""
    data, _ = train.data.open_data(settings_of(train, mixture, tmp_path))
    read = sequences(data, 300)
    again, _ = train.data.open_data(settings_of(train, mixture, tmp_path))
    assert [divmod(int(again.shuffled(n).ids[-1]), 100) for n in reversed(range(300))] == read[::-1]
    other, _ = train.data.open_data(settings_of(train, mixture, tmp_path, "--seed", "1"))
    assert sequences(other, 300) != read


def test_what_is_held_out(train: Any, mixture: Path, tmp_path: Path) -> None:
    """The end of each source, which training does not read; --val-data may be a mixture, too."""
    given = ["--val-every", "1", "--val-fraction", "0.2"]
    data, held_out = train.data.open_data(settings_of(train, mixture, tmp_path, *given))
    kept = [divmod(int(held_out.read(n).ids[0]), 100) for n in range(held_out.per_epoch)]
    assert kept == [(0, 8), (0, 9), (1, 4), *((2, place) for place in range(32, 40))]
    assert not set(sequences(data, 2000)) & set(kept)
    with pytest.raises(IndexError):
        held_out.read(held_out.per_epoch)
    _, other = train.data.open_data(
        settings_of(train, mixture, tmp_path, "--val-every", "1", "--val-data", str(mixture))
    )
    assert other.per_epoch == 55


def start(train: Any, data: Path, out: Path, *more: str) -> int:
    """Train for 6 steps, and return the exit code."""
    given = ["--data", str(data), "--out", str(out), "--steps", "6", "--batch-size", "4", "--seq-len", "16"]
    code: int = train.train.main([*given, "--save-every", "2", "--val-every", "0", *more])
    return code


def run(train: Any, data: Path, out: Path, *more: str) -> list[tuple[int, float, float]]:
    """Train, and return step, loss and norm of the gradient of each step."""
    assert start(train, data, out, *more) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def test_goes_on_to_the_same_bits(
    train: Any, mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """But not with other weights, or other data."""
    steady = ["--decay", "0"]
    whole = run(train, mixture, tmp_path / "whole", *steady)
    said = capsys.readouterr().err
    assert f"52.63% of {tmp_path}/0.npy: 1 file of token ids, 160 tokens (int64)" in said
    run(train, mixture, tmp_path / "parts", *steady, "--steps", "2")
    assert run(train, mixture, tmp_path / "parts", *steady, "--resume") == whole
    mixture.write_text(mixture.read_text().replace("weight = 5", "weight = 6"))
    assert start(train, mixture, tmp_path / "parts", *steady, "--steps", "9", "--resume") == 6
    assert "is of other data: sources [[160, 5263]" in capsys.readouterr().err


def test_goes_on_with_the_same_text_only(train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The content of files that become tokens is compared, wherever they lie."""
    make_tokenizer(tmp_path / "tokenizer")
    lines = [json.dumps({"text": text}) for text in DOCUMENTS]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    given = ["--tokenizer", str(tmp_path / "tokenizer")]
    run(train, tmp_path / "a.jsonl", tmp_path / "out", *given, "--steps", "2")
    run(train, tmp_path / "b.jsonl", tmp_path / "out", *given, "--steps", "3", "--resume")
    (tmp_path / "b.jsonl").write_text("\n".join(reversed(lines)))
    assert start(train, tmp_path / "b.jsonl", tmp_path / "out", *given, "--steps", "4", "--resume") == 6
    assert "is of other data: contents " in capsys.readouterr().err


def test_sources_of_different_kinds(train: Any, mixture: Path, tmp_path: Path) -> None:
    """Each has options of its own; those without boundaries of documents are one document."""
    make_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "body.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in DOCUMENTS))
    np.arange(160, dtype="<u4").tofile(tmp_path / "wide.bin")
    mixture.write_text(
        f'[[source]]\npath = "{tmp_path}/body.jsonl"\ntext_field = "body"\nweight = 1\n'
        f'[[source]]\npath = "{tmp_path}/wide.bin"\ndtype = "uint32"\nweight = 1\n'
    )
    data, _ = train.data.open_data(settings_of(train, mixture, tmp_path, "--tokenizer", str(tmp_path / "tokenizer")))
    windows = [data.shuffled(n) for n in range(40)]
    batch = train.data.Batch.of(windows)
    kinds = [window.documents is not None for window in windows]
    assert any(kinds) and not all(kinds)
    for window, row in zip(windows, batch.documents, strict=True):
        assert row.tolist() == ([0] * 16 if window.documents is None else window.documents.tolist())


@pytest.mark.parametrize("start", [0, 10])
def test_windows_move_from_epoch_to_epoch(train: Any, start: int) -> None:
    """By fewer tokens than one has, as far as the last ones allow; within an epoch none is read twice."""
    tokens = train.tokens.Tokens(Path("a"), 512, [torch.arange(100)])
    windows = train.data.Windows(tokens, start, start + 55, 16, seed=1)
    assert windows.per_epoch == 3
    shifts = set[int]()
    for epoch in range(60):
        firsts = sorted(int(windows.shuffled(3 * epoch + n).ids[0]) for n in range(3))
        shifts.add(shift := firsts[0] - start)
        assert firsts == [start + shift, start + shift + 16, start + shift + 32]
    assert shifts == set(range(8))  # 7 tokens are left over


def test_orders_of_their_own(train: Any) -> None:
    """Epochs, and blocks of a mixture, have one each that seed and number give; the largest seed is one."""
    seeds, numbers = (0, 1, 2, 2**31, 2**63 - 1), (0, 1, 126, 127)
    epochs = [train.data.epoch_order(seed, n, 99, 9)[0].tolist() for seed in seeds for n in numbers]
    counts = (6000, 4000)
    blocks = [train.data.block_order(seed, counts, n)[0].tolist() for seed in seeds for n in numbers]
    for orders in (epochs, blocks):
        assert len(set(map(tuple, orders))) == len(orders)
    assert epochs[5] == train.data.epoch_order(1, 1, 99, 9)[0].tolist()


def test_a_mixture_of_two(train: Any, tmp_path: Path) -> None:
    """Both are read, and said, and what a run that goes on is compared by."""
    data = train.data
    tokens = [train.tokens.Tokens(Path("a"), 512, [torch.full((40,), n)], opened=f"file {n}") for n in (1, 2)]
    windows = [data.Windows(each, 0, stop, 8) for each, stop in zip(tokens, (40, 39), strict=True)]
    mixture = data.Mixture(windows, [7500, 2500], 0)
    read = Counter(int(mixture.shuffled(n).ids[0]) for n in range(10_000))
    assert read == {1: 7500, 2: 2500}
    assert mixture.opened() == ["75.00% of file 1", "25.00% of file 2"]
    assert mixture.signature == {"train_tokens": 79, "sources": [[40, 7500], [39, 2500]]}
    alone = data.Mixture(windows[:1], [10_000], 0)
    assert alone.opened() == ["file 1"] and alone.signature == {"train_tokens": 40}


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ([3.0], [10_000]),
        ([1, 9999], [1, 9999]),
        ([1, 1, 1], [3334, 3333, 3333]),
        ([2, 2, 2, 1], [2857, 2857, 2857, 1429]),
        ([0.5, 0.25, 0.25], [5000, 2500, 2500]),
    ],
)
def test_parts_of_a_block(train: Any, weights: list[float], counts: list[int]) -> None:
    assert train.data.counts_of(weights) == counts


def test_less_than_a_part_of_a_block(train: Any) -> None:
    with pytest.raises(train.settings.TrainError, match=r"less than 1/10000 of their sum"):
        train.data.counts_of([0.999, 9999])


def test_what_is_no_mixture(train: Any, mixture: Path, tmp_path: Path) -> None:
    """A .toml that is asked for as text or bytes, and a folder of that name."""
    settings = settings_of(train, mixture, tmp_path, "--data-format", "bytes")
    assert train.data.sources_of(settings) == ([settings], [1.0])
    data, held_out = train.data.open_data(settings)
    assert data.sources[0].tokens.bytes_are_tokens and held_out is None
    folder = tmp_path / "folder.toml"
    folder.mkdir()
    np.save(folder / "ids.npy", np.arange(32))
    data, _ = train.data.open_data(settings_of(train, folder, tmp_path / "out"))
    assert data.signature == {"train_tokens": 32}


def test_one_sequence_is_enough(train: Any, tmp_path: Path) -> None:
    """And the most windows are 2**30; nothing is held out where nothing is to be validated."""
    np.save(tmp_path / "ids.npy", np.arange(31))
    given = ["--val-fraction", "0.6", "--val-every", "0", "--val-data", str(tmp_path / "ids.npy")]
    data, held_out = train.data.open_data(settings_of(train, tmp_path / "ids.npy", tmp_path / "out", *given))
    assert data.sources[0].per_epoch == 1 and data.signature == {"train_tokens": 31} and held_out is None
    np.save(tmp_path / "ids.npy", np.arange(15))
    with pytest.raises(train.settings.TrainError, match="holds 15 tokens, and one sequence has 16"):
        train.data.open_data(settings_of(train, tmp_path / "ids.npy", tmp_path / "out"))

    def windows(count: int) -> Any:
        return SimpleNamespace(tokens=SimpleNamespace(path="p"), length=2, per_epoch=count)

    train.data.require_windows(windows(1 << 30))
    with pytest.raises(
        train.settings.TrainError, match=r"p holds 1073741825 sequences of 2 tokens, more than 10737418"
    ):
        train.data.require_windows(windows((1 << 30) + 1))


def test_labels_of_a_batch(train: Any) -> None:
    """They are the ids themselves, unless some do not count; on a device as before."""
    ids, labels = torch.tensor([1, 2, 3]), torch.tensor([1, -100, 3])
    plain, masked = train.tokens.Window(ids, ids), train.tokens.Window(ids, labels)
    for batch in (train.data.Batch.of([plain, masked]), train.data.Batch.of([masked, plain])):
        for found in (batch, batch.to(torch.device("cpu"))):
            assert found.ids.tolist() == [[1, 2, 3]] * 2 and found.documents is None
            assert sorted(found.labels.tolist()) == [[1, -100, 3], [1, 2, 3]]
    batch = train.data.Batch.of([plain, plain]).to(torch.device("cpu"))
    assert batch.labels is batch.ids


def test_separators_where_a_document_is_known_to_end(train: Any) -> None:
    """It ends once. A separator may be token 0; without one the tokens tell of no end."""
    ids = torch.tensor([7, 3, 5, 0, 3, 1])
    window = train.tokens.Window(ids, ids, torch.tensor([0, 0, 1, 1, 1, 2], dtype=torch.int32))

    def ends(batch: Any) -> list[bool]:
        return [a != b for a, b in pairwise(batch.documents[0].tolist())]

    assert ends(train.data.Batch.of([window], 3)) == [False, True, False, False, True]
    assert ends(train.data.Batch.of([window], 0)) == [False, True, False, True, True]
    assert ends(train.data.Batch.of([window])) == [False, True, False, False, True]
    assert train.data.Batch.of([train.tokens.Window(ids, ids)]).documents is None


def test_separators_and_known_ends(train: Any) -> None:
    """A document ends where either says so."""
    ids = torch.tensor([7, 3, 5, 5, 3, 1])
    window = train.tokens.Window(ids, ids, torch.tensor([0, 0, 0, 1, 1, 1], dtype=torch.int32))
    documents = train.data.Batch.of([window], 3).documents[0].tolist()
    assert [a != b for a, b in pairwise(documents)] == [False, True, True, False, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no [[source]]: a .toml is a mixture of sources"),
        ("[source]\nx = 1", "has no [[source]]"),
        ("source = [1]", "has no [[source]]"),
        ("[[source", "cannot be read: "),
        ('[[source]]\npath = "a"', "source 1: weight = None is no number above 0"),
        ('[[source]]\npath = "a"\nweight = 0', "source 1: weight = 0 is no number above 0"),
        ('[[source]]\npath = "a"\nweight = nan', "source 1: weight = nan is no number"),
        ('[[source]]\npath = "a"\nweight = inf', "source 1: weight = inf is no number"),
        ('[[source]]\npath = "a"\nweight = -1', "source 1: weight = -1 is no number"),
        ('[[source]]\npath = "a"\nweight = 1\n[[source]]\npath = "b"', "source 2: weight = None is no number"),
        ('[[source]]\npath = "a"\nweight = true', "source 1: weight = True is no number"),
        ("[[source]]\nweight = 1", "source 1: path is missing"),
        ('[[source]]\npath = "a"\nweight = 1\ntext_field = 3', "a value is no string"),
        ('[[source]]\npath = "a"\nweight = 1\nseed = 3', "source 1: seed is none of data_format, dtype"),
        ('[[source]]\npath = "a"\nweight = 1\ndtype = "x"', "--dtype x is none of uint8"),
        ('[[source]]\npath = "a"\nweight = 1\n[[source]]\npath = "b"\nweight = 1e-9', "less than 1/10000"),
    ],
)
def test_bad_mixtures(train: Any, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mixture.toml").write_text(text)
    with pytest.raises(train.settings.TrainError) as error:
        train.data.open_data(settings_of(train, tmp_path / "mixture.toml", tmp_path))
    assert message in str(error.value) and error.value.code in (2, 6)
