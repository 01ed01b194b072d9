"""The blocks of a model as data: they add up to the figures, and alike ones share a variant."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from n3c.compiler import inspect
from n3c.compiler.report.cost import decode_bytes
from n3c.passes.serving import serve
from n3c.specs.load import load_spec
from support.command import n3c, write_small
from support.specs import QUANTIZED, SPECS


@pytest.fixture(params=["super", "tiny-moe", "nemotron-h-8b", "small"])
def figures(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    name = request.param
    return inspect(write_small(tmp_path, extra=QUANTIZED) if name == "small" else SPECS / f"{name}.toml").figures


def test_blocks_add_up_to_the_figures(figures: dict[str, Any]) -> None:
    variants = [figures["variants"][block["variant"]] for block in figures["blocks"]]
    trunk = [v for b, v in zip(figures["blocks"], variants, strict=True) if not b["label"].startswith("mtp")]
    parameters, state = figures["parameters"], figures["state"]
    assert sum(variant["bytes"] for variant in variants) == figures["weights"]["bytes"]
    assert sum(variant["parameters"] for variant in variants) == parameters["total"] + parameters["mtp"]
    assert sum(variant["parameters"] for variant in trunk) == parameters["total"]
    assert sum(variant["flops_per_token"] for variant in trunk) == figures["flops_per_token"]
    assert sum(variant["state_bytes_per_request"] for variant in variants) == state["bytes_per_request"]
    assert sum(variant["kv_bytes_per_token"] for variant in trunk) == state["kv_bytes_per_token"]
    for variant in figures["variants"]:
        assert sum(variant["by_format"].values()) == variant["bytes"]
        assert sum(weight["bytes"] for weight in variant["weights"]) == variant["bytes"]


def test_layers_are_those_of_the_pattern_in_order(figures: dict[str, Any]) -> None:
    layers = [block["layer"] for block in figures["blocks"] if block["layer"] is not None]
    assert layers == list(range(figures["layers"]["total"]))
    labels = [block["label"] for block in figures["blocks"]]
    assert len(set(labels)) == len(labels)
    assert {block["kind"] for block in figures["blocks"]} >= {"embedding", "norm", "head"}


def test_alike_blocks_share_a_variant() -> None:
    figures = inspect(SPECS / "super.toml").figures
    assert len(figures["blocks"]) == 88 + 3 + 2
    used = [block["variant"] for block in figures["blocks"] if block["layer"] is not None]
    assert sorted(set(used)) == [1, 2, 3]
    different = inspect(SPECS / "super.toml", set=['quantization.rules.1.layers="last 14"']).figures
    assert len(different["variants"]) > len(figures["variants"])


def test_decode_moves_what_the_figures_say_and_more_tokens_more(figures: dict[str, Any]) -> None:
    entries = {entry["entry"]: entry for entry in figures["entries"]}
    assert entries["decode"]["bytes"] == figures["decode"]["bytes"]["total"]
    assert entries["decode"]["flops"] == figures["decode"]["flops"]
    assert entries["prefill"]["flops"] > entries["decode"]["flops"]
    assert entries["prefill"]["flops_per_byte"] > entries["decode"]["flops_per_byte"]
    for entry in figures["entries"]:
        times = {bound["gpu"]: bound["us"] for bound in entry["roofline"]}
        assert times["B200"] <= times["RTX 4060"]


def test_entry_bytes_follow_batch_and_context() -> None:
    spec, _ = load_spec(SPECS / "super.toml")
    served = serve(spec)
    for batch, context in ((1, 1), (8, 4096), (64, 100_000)):
        entries = inspect(spec, context=context, batch=batch).figures["entries"]
        decode = next(entry for entry in entries if entry["entry"] == "decode")
        assert decode["bytes"] == decode_bytes(served, spec, batch, context)["total"]
    intensities = [
        next(e for e in inspect(spec, batch=batch).figures["entries"] if e["entry"] == "decode")["flops_per_byte"]
        for batch in (1, 8, 64)
    ]
    assert all(a < b for a, b in pairwise(intensities))


def test_a_build_has_the_blocks_of_its_spec(tmp_path: Path) -> None:
    spec = write_small(tmp_path, extra=QUANTIZED)
    assert n3c("build", spec, "--target", "torch", "-o", tmp_path / "out").code == 0
    built, read = (n3c("inspect", path, "--json").data for path in (tmp_path / "out", spec))
    assert (built["blocks"], len(built["variants"])) == (read["blocks"], len(read["variants"]))
    names = {
        f"{block['label']}.{weight['name']}"
        for block in built["blocks"]
        for weight in built["variants"][block["variant"]]["weights"]
    }
    assert names == {entry["name"] for entry in built["ledger"]}
