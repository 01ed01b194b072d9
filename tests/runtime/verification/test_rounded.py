"""Builds whose products round activations, whose caches are narrow: right ones pass, wrong ones are found.

`prefill` of 40 tokens computes products of stored types (FP4, FP8, BF16), which the reference rounds as it does.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from n3c.backends.hashing import sha256_file
from n3c.runtime.verification.run import Verified, verify
from support.checkpoints import write_checkpoint
from support.command import n3c
from support.specs import QUANTIZED, SMALL, SPECS, spec_from_text

FILES = "ONNX files, reference evaluator"
TEXT = SMALL.replace('"MEM*E-ME"', '"MEM*-"').replace(
    "max_seq_len = 32", "max_seq_len = 64\nprefill_chunk = 40\ndraft_tokens = 2"
) + QUANTIZED.replace('roles = ["moe.shared.up"]\nlayers = "last 4"', 'roles = ["moe.shared.up"]')
NARROW = TEXT.replace('conv_state_dtype = "fp32"', 'conv_state_dtype = "bf16"\nssm_state_dtype = "fp16"')
TEXTS = {
    "float32 states": TEXT,
    "FP8 cache": NARROW.replace('kv_cache_dtype = "fp32"', 'kv_cache_dtype = "fp8"'),
    "BF16 cache": NARROW.replace('kv_cache_dtype = "fp32"', 'kv_cache_dtype = "bf16"'),
}


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Builds a spec of `TEXTS` the first time that it is asked for."""
    folder = tmp_path_factory.mktemp("rounded")

    def build(name: str) -> Path:
        out = folder / name
        if not out.exists():
            spec = folder / f"{name}.toml"
            spec.write_text(TEXTS[name].lstrip())
            assert n3c("build", spec, "--target", "onnx", "-o", out).code == 0
        return out

    return build


def altered(build: Path, out: Path, file: str, change: Callable[[Any], None]) -> Path:
    """Copy a build with one graph changed, and let the manifest agree: a fault of the compiler, not of the disk."""
    shutil.copytree(build, out)
    model = onnx.load(out / file)
    change(model)
    onnx.save(model, out / file)
    manifest = json.loads((out / "manifest.json").read_text())
    (row,) = (row for row in manifest["files"] if row["path"] == file)
    row["bytes"], row["sha256"] = (out / file).stat().st_size, sha256_file(out / file)
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


def found(verified: Verified) -> dict[str, str | None]:
    """Return the first point that differs, of each implementation."""
    return {v.name: v.first.difference.point if v.first is not None else None for v in verified.verdicts}


@pytest.mark.parametrize("name", TEXTS)
def test_right_builds_pass(name: str, builds: Callable[[str], Path]) -> None:
    verified = verify(builds(name), seed=1)
    assert verified.ok, verified.diagnostics
    for verdict in verified.verdicts:
        assert verdict.worst is not None
        assert verdict.worst.excess < 0.5, (verdict.name, verdict.worst)
        assert verdict.worst.tolerance < (0.1 if verdict.name == FILES else 2e-4)


def test_the_shipped_tiny_moe_passes(tmp_path: Path) -> None:
    """All of it is W4A4 but attention: end to end, activations that are not rounded alike are 0.3 apart."""
    assert n3c("build", SPECS / "tiny-moe.toml", "--target", "onnx", "-o", tmp_path / "out").code == 0
    verified = verify(tmp_path / "out")
    assert verified.ok, verified.diagnostics
    (files,) = (verdict for verdict in verified.verdicts if verdict.name == FILES)
    assert files.worst is not None
    assert files.worst.error < 1e-5


def nodes(model: Any, layer: int, *kinds: str) -> list[Any]:
    scope = f"backbone.layers.{layer}/"
    return [node for node in model.graph.node if node.name.startswith(scope) and node.op_type in kinds]


def scale_product(layer: int, which: int, factor: float) -> Callable[[Any], None]:
    """Return a change that multiplies the result of a layer's matrix product."""

    def change(model: Any) -> None:
        node = nodes(model, layer, "Gemm", "MatMul")[which]
        result = node.output[0]
        node.output[0] = f"{result}.right"
        model.graph.initializer.append(numpy_helper.from_array(np.array(factor, np.float32), "factor"))
        at = list(model.graph.node).index(node) + 1
        make: Any = onnx.helper.make_node
        model.graph.node.insert(at, make("Mul", [f"{result}.right", "factor"], [result], name=f"{node.name}.scaled"))

    return change


@pytest.mark.parametrize(("layer", "which", "factor"), [(0, -1, 1.02), (1, 0, 0.98), (1, -1, 1.02), (4, -1, 0.98)])
def test_a_scale_that_is_off_by_a_fiftieth(
    layer: int, which: int, factor: float, builds: Callable[[str], Path], tmp_path: Path
) -> None:
    """In `prefill` alone, where activations are rounded: a Mamba layer, the experts, the MLP."""
    change = scale_product(layer, which, factor)
    verified = verify(altered(builds("float32 states"), tmp_path / "out", "onnx/prefill.onnx", change))
    assert found(verified)[FILES] == f"backbone.layers.{layer}"


def test_routing_that_takes_the_least_likely_experts(builds: Callable[[str], Path], tmp_path: Path) -> None:
    def change(model: Any) -> None:
        choice = nodes(model, 1, "TopK")[-1]
        choice.attribute.append(onnx.helper.make_attribute("largest", 0))

    verified = verify(altered(builds("float32 states"), tmp_path / "out", "onnx/prefill.onnx", change))
    assert found(verified)[FILES] == "backbone.layers.1"


def test_a_weight_of_which_one_value_is_changed(tmp_path: Path) -> None:
    """Weights inside the graphs: one of 6,144 FP4 codes of the MLP's projection is its neighbour."""
    (tmp_path / "spec.toml").write_text(TEXT.lstrip())
    write_checkpoint(tmp_path / "weights", spec_from_text(TEXT))
    options = ("--entry", "decode", "--weights-mode", "embedded", "--weights", tmp_path / "weights")
    right = tmp_path / "right"
    assert n3c("build", tmp_path / "spec.toml", "--target", "onnx", *options, "-o", right).code == 0

    def change(model: Any) -> None:
        scope = "backbone.layers.4.mixer.down_proj.weight"
        codes = max((t for t in model.graph.initializer if t.name.startswith(scope)), key=lambda t: len(t.raw_data))
        raw = bytearray(codes.raw_data)
        raw[4] ^= 1
        codes.raw_data = bytes(raw)

    wrong = altered(right, tmp_path / "wrong", "onnx/decode.onnx", change)
    assert verify(right, weights=tmp_path / "weights").ok
    assert found(verify(wrong, weights=tmp_path / "weights"))[FILES] == "backbone.layers.4"
