"""`n3c bench`: every figure is there for each batch and context, and follows from what ran."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from n3c.runtime import bench
from n3c.runtime.benchmark.result import Percentiles
from support.checkpoints import write_checkpoint
from support.command import n3c
from support.specs import SMALL, spec_from_text

TEXT = SMALL.replace('"MEM*E-ME"', '"M*E"').replace(
    "max_seq_len = 32", "batch_sizes = [1, 2]\nmax_seq_len = 48\nprefill_chunk = 8\ndraft_tokens = 2"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    (folder / "spec.toml").write_text(TEXT.lstrip())
    write_checkpoint(folder / "weights", spec_from_text(TEXT), shards=1)
    assert n3c("build", folder / "spec.toml", "--target", "torch", "-o", folder / "out").code == 0
    return folder


@pytest.mark.parametrize("engine", ["onnxruntime", "torch", "reference"])
def test_every_batch_and_context(engine: str, folder: Path) -> None:
    options = ("--context", 9, "--context", 20, "--new-tokens", 6, "--runs", 2, "--engine", engine, "--json")
    result = n3c("bench", folder / "out", *options)
    assert result.code == 0, result.err
    data = result.data
    assert (data["engine"], data["device"], data["speculative"]) == (engine, "cpu", True)
    assert data["weights"] == "random weights (seed 0)"
    assert [(row["batch"], row["context"]) for row in data["rows"]] == [(1, 9), (1, 20), (2, 9), (2, 20)]
    for row in data["rows"]:
        for key in ("time_to_first_token_ms", "time_per_token_ms"):
            times = row[key]
            assert 0 < times["p50"] <= times["p90"] <= times["p99"]
        assert row["tokens_per_second"] > 0 and row["prefill_tokens_per_second"] > 0
        assert 1 <= row["acceptance_length"] <= 3


def test_a_checkpoint_without_drafts_as_a_table(folder: Path) -> None:
    result = n3c(
        "bench", folder / "out", "--weights", folder / "weights", "--no-mtp", "--batch", 3, "--engine", "torch",
        "--new-tokens", 4, "--runs", 1,
    )  # fmt: skip
    assert result.code == 0, result.err
    header, _, row, last = result.out.splitlines()
    assert header.startswith("batch  context") and row.split()[:2] == ["3", "43"]
    assert last.startswith("torch on cpu (") and last.endswith(f", without drafts; {folder / 'weights'}")


def test_more_than_the_memory_holds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told before anything is allocated, by the largest batch; where it cannot be foretold, by the allocator."""

    def opened(*_: object) -> None:
        raise AssertionError("nothing is to be opened")

    with monkeypatch.context() as patch:
        patch.setattr("n3c.runtime.engines.memory.available_memory_bytes", lambda: 2_000_000)
        assert n3c("bench", folder / "out", "--batch", 1, "--new-tokens", 2, "--runs", 1).code == 0
        patch.setattr("n3c.runtime.benchmark.run._opened", opened)
        for batch in (400, 65536):
            result = n3c("bench", folder / "out", "--batch", 1, "--batch", batch, "--engine", "torch", "--json")
            assert (result.code, result.codes) == (4, ["E0815"])
            assert f"{batch:,} sequences need" in result.data["diagnostics"][0]["message"]


@pytest.mark.parametrize("place", ["measure.measure", "run._opened"])
def test_an_allocation_that_fails(place: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        torch.zeros(1 << 50)  # more than addresses reach

    monkeypatch.setattr(f"n3c.runtime.benchmark.{place}", fails)
    result = n3c("bench", folder / "out", "--engine", "torch", "--json")
    assert (result.code, result.codes) == (4, ["E0815"])


def test_the_api_returns_the_same(folder: Path) -> None:
    measured = bench(folder / "out", engine="torch", batch=[1], context=[8], new_tokens=4, runs=1)
    (row,) = measured.rows
    assert measured.as_json()["rows"] == [row.as_json()]
    assert row.time_to_first_token.p50 / 1000 == pytest.approx(8 / row.prefill_tokens_per_second)


def test_what_does_not_fit(folder: Path) -> None:
    assert n3c("bench", folder / "out", "--context", 47, "--json").codes == ["E0802"]
    refused = n3c("bench", folder / "out", "--engine", "tensorrt", "--json")
    assert (refused.code, refused.codes) == (2, ["E0707"])


def test_percentiles_are_milliseconds() -> None:
    times = Percentiles.of([0.001 * i for i in range(1, 102)])
    assert (times.p50, times.p90, times.p99) == pytest.approx((51, 91, 100))
