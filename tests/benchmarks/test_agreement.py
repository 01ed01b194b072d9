"""Drafts and chunks change what rounding explains and nothing else: greedy tokens, logits, on small models."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from n3c.passes.lower.model import lower
from support.drafters import Oracle
from support.programs import random_tensors, save_tensors
from support.specs import SMALL, spec_from_text

ROOT = Path(__file__).parents[2]
VOCAB = 97
IDS = np.random.default_rng(2).integers(0, VOCAB, 40).tolist()
FORMATS = """
[quantization]
format = "{}"
block = [1, 16]
[[quantization.rules]]
roles = ["moe.router", "mtp.*", "embedding", "lm_head"]
format = "bf16"
"""


@pytest.fixture
def agreement(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.agreement")


def model(agreement: Any, folder: Path, format_: str) -> Any:
    """Return a small model of Mamba-2, attention and experts with random weights in a format."""
    serving = "max_seq_len = 48\nprefill_chunk = 8\ndraft_tokens = 2"
    text = SMALL.replace('"MEM*E-ME"', '"M*E"').replace("max_seq_len = 32", serving) + FORMATS.format(format_)
    spec = spec_from_text(text)
    return agreement.Model(spec, save_tensors(random_tensors(lower(spec)), folder))


def test_twenty_generations(agreement: Any, tmp_path: Path) -> None:
    """Under W4A4 each token that differs is where both roads agree as soon as they round alike; weight-only none is."""
    rounded = model(agreement, tmp_path, "nvfp4")
    random = np.random.default_rng(0)
    prompts = [random.integers(0, VOCAB, int(random.integers(1, 20))).tolist() for _ in range(20)]
    for each in (rounded, rounded.serving(activations="weight_only")):
        capacity = agreement.Capacity.of(each.spec)
        plain, _ = agreement.continued(each.engine(agreement.BATCH), prompts, 9, capacity, None)
        oracle = Oracle(prompts, [made.tokens for made in plain], "random", VOCAB)
        found = agreement.generations(each, prompts, 9, oracle)
        assert 1.2 < found.tokens_a_round < 2.8
        assert all(parted.margin <= 2 * parted.apart for parted in found.parted)
        assert all(rest < 1e-4 for rest in found.rest)
    assert found.parted == [] and found.largest < 1e-4


@pytest.mark.parametrize("format_", ["nvfp4", "fp8"])
def test_chunks_and_single_tokens(agreement: Any, format_: str, tmp_path: Path) -> None:
    rounded = model(agreement, tmp_path, format_)
    exact = rounded.serving(activations="weight_only")
    slow = agreement.token_by_token(exact.engine(), IDS)
    first = agreement.Roundings(len(IDS))
    expected = agreement.token_by_token(rounded.reference(first), IDS, note=first.at)
    for chunk in (1, 7, 40):
        quick = agreement.in_chunks(exact.serving(prefill_chunk=chunk).engine(), IDS)
        assert agreement.largest_difference(slow, quick) < 1e-4
        alike = agreement.Roundings(len(IDS), given=first)
        actual = agreement.in_chunks(rounded.serving(prefill_chunk=chunk).reference(alike), IDS, alike.at)
        assert agreement.largest_difference(expected, actual) < 1e-4
        assert alike.rounded > 10_000 and alike.tipped <= 1e-3 * alike.rounded


def test_other_numbers_count_as_tipped(agreement: Any, tmp_path: Path) -> None:
    """Another road is held to the roundings of the first, and what it would have rounded otherwise is counted."""
    rounded = model(agreement, tmp_path, "nvfp4")
    first, own = agreement.Roundings(len(IDS)), agreement.Roundings(len(IDS))
    alike = agreement.Roundings(len(IDS), given=first)
    expected = agreement.token_by_token(rounded.reference(first), IDS, note=first.at)
    other = [*IDS[:20], (IDS[20] + 1) % VOCAB, *IDS[21:]]
    actual = agreement.token_by_token(rounded.reference(own), other, note=own.at)
    held = agreement.token_by_token(rounded.reference(alike), other, note=alike.at)
    before = range(20)
    assert agreement.largest_difference({at: expected[at] for at in before}, actual) == 0
    assert own.share_of(first) > 0.05 and own.choices_apart(first) > 0
    assert 0 < alike.tipped < own.share_of(first) * alike.rounded
    assert 1e-3 < agreement.largest_difference(expected, held) < agreement.largest_difference(expected, actual)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_five_hundred_generations_of_a_trained_model(agreement: Any) -> None:
    """All tables of `python -m benchmarks agreement`."""
    lines = list(agreement.run(False))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    generated = [row for row in rows if len(row) == 6 and row[1] in ("rounded", "as they are")]
    assert len(generated) == 5
    assert all(row[3] == "0" for row in generated if row[1] == "as they are")
    assert all(float(row[2]) > 1.2 for row in generated)
    differing = [row for row in rows if len(row) == 6 and row[1].isdigit()]
    assert len(differing) == sum(int(row[3]) for row in generated)
    assert all(float(margin) <= 2 * float(apart) and float(rest) < 1e-4 for *_, margin, apart, rest in differing)
    chunked = [row for row in rows if len(row) == 7 and row[1] == "as they are"]
    assert len(chunked) == 3
    assert all(float(cell) < 1e-4 for row in chunked for cell in row[3:])
    tipped = [row for row in rows if len(row) == 7 and row[4].count(" of ")]
    assert len(tipped) == 8
    assert all(float(row[5]) < 1e-4 and float(row[6]) < 1e-4 for row in tipped)
