"""Embedded weights: the same numbers, from one file that all graphs of a folder share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from n3c.backends.onnx.bindings import parameter_of
from n3c.backends.onnx.embedded import WEIGHTS_FILE, WeightsFile, embed
from n3c.backends.onnx.emit import emit_entry
from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.backends.safetensors.sources import load
from n3c.backends.trt.audit import audit
from n3c.backends.trt.build import build_plan
from n3c.backends.trt.constants import weights_as_inputs
from n3c.backends.trt.module import load_trt
from n3c.backends.trt.traffic import traffic
from n3c.ir.types import DType
from n3c.passes.lower.model import lower
from n3c.passes.serving import Served, serve
from support.onnx_run import FP4DynamicQuantize, OnnxRunner, from_numpy, to_numpy
from support.programs import as_torch, random_tensors, save_tensors
from support.serving_inputs import BATCH, arguments
from support.specs import QUANTIZED, small_spec

SERVING = ("max_seq_len = 32", "max_seq_len = 32\nprefill_chunk = 20\ndraft_tokens = 2")
ENTRIES = ("decode", "prefill", "verify", "draft")


@pytest.fixture(scope="module")
def served() -> Served:
    return serve(small_spec(QUANTIZED, odd=SERVING))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return save_tensors(random_tensors(lower(small_spec(QUANTIZED))), tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.parametrize("lacking", [(), (DType.F4E2M1, DType.F8E4M3)], ids=["Blackwell", "Ampere"])
def test_the_same_numbers_as_bound(lacking: tuple[DType, ...], checkpoint: Checkpoint, tmp_path: Path) -> None:
    served = serve(small_spec(QUANTIZED, odd=SERVING), lacking=lacking)
    with WeightsFile(tmp_path, checkpoint) as file:
        for name in ENTRIES:
            entry = emit_entry(served.program, name, batch=BATCH)
            weights = {parameter_of(p.name): as_torch(load(p, checkpoint), p.type.dtype) for p in entry.parameters}
            values = arguments(entry, served.program, vocabulary=97, width=64)
            bound = OnnxRunner(entry, weights).run(values)
            embed(entry, file)
            entry.save(tmp_path / f"{name}.onnx")
            graph = onnx.load(tmp_path / f"{name}.onnx").graph
            assert [value.name for value in graph.input] == [b.name for b in entry.arguments]
            session = ReferenceEvaluator(onnx.load(tmp_path / f"{name}.onnx"), new_ops=[FP4DynamicQuantize])
            found: Any = session.run(None, {b.name: to_numpy(values[b.name], b) for b in entry.arguments})
            for binding, array in zip(entry.results, found, strict=True):
                torch.testing.assert_close(from_numpy(array), bound[binding.source], rtol=0, atol=0)


def test_equal_memory_is_there_once(served: Served, checkpoint: Checkpoint, tmp_path: Path) -> None:
    memories: dict[str, int] = {}
    with WeightsFile(tmp_path, checkpoint) as file:
        for name in ENTRIES:
            entry = emit_entry(served.program, name, batch=1)
            embed(entry, file)
            memories |= {p.memory: p.type.bytes for p in entry.parameters}
    pages = sum(-(-size // 4096) * 4096 for size in memories.values())
    assert pages - 4096 < (tmp_path / WEIGHTS_FILE).stat().st_size <= pages
    assert sum(memories.values()) == sum(p.type.bytes for p in served.program.parameters.values())


def test_a_plan_keeps_the_stored_types(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """What the builder could compute beforehand it would keep wide: BF16 as float32, bytes as integers."""
    program = serve(small_spec(QUANTIZED)).program
    entry = emit_entry(program, "decode", batch=1)
    with WeightsFile(tmp_path, checkpoint) as file:
        embed(entry, file)
    entry.save(path := tmp_path / "decode.onnx")
    result = build_plan(path, tmp_path / "x.plan", load_trt(), sms=(120,), ranges=entry.dynamic_inputs)
    kernels = weights_as_inputs(result.kernels, entry.weights)
    verdict = audit(entry.linears, kernels, entry.output_names, result.scratch_bytes)
    assert verdict.mismatches == () and {f.realised for f in verdict.findings} == {"nvfp4", "fp8", "bf16"}
    found = traffic(program, program.entry_points["decode"], entry, kernels, context=32).total
    assert 1 < found.bytes / found.ideal < 1.7
    assert result.bytes > sum(p.type.bytes for p in entry.parameters)
