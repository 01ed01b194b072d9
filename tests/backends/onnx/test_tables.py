"""Codes bound as bytes: the graphs for GPUs without FP4 or FP8 compute what the native ones do."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from torch import Tensor

from n3c.backends.onnx.bindings import parameter_of
from n3c.backends.onnx.emit import OnnxEntry, emit_entry
from n3c.backends.onnx.spellings.tables import e4m3_table, nibble_tables
from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.backends.safetensors.sources import load
from n3c.ir.program import Program
from n3c.ir.types import DType
from n3c.passes.lower.model import lower
from n3c.passes.serving import serve
from n3c.runtime.engines.reference.evaluate import evaluate
from support.onnx_run import OnnxRunner
from support.programs import as_torch, load_parameters, random_tensors, save_tensors
from support.serving_inputs import BATCH, arguments
from support.specs import QUANTIZED, small_spec, weight_only

FP8_EXPERTS = QUANTIZED + '[[quantization.rules]]\nroles = ["moe.experts.*"]\nformat = "fp8"\n'
SERVING = ("max_seq_len = 32", "max_seq_len = 32\nprefill_chunk = 20\ndraft_tokens = 2")
ADA, AMPERE = (DType.F4E2M1,), (DType.F4E2M1, DType.F8E4M3)


def opened(formats: str, folder: Path, lacking: tuple[DType, ...]) -> tuple[Program, Program, Checkpoint]:
    """Return the weight-only program for Blackwell, that for a GPU that lacks types, and a checkpoint."""
    spec = weight_only(small_spec(formats, odd=SERVING))
    checkpoint = save_tensors(random_tensors(lower(spec)), folder)
    return serve(spec).program, serve(spec, lacking=lacking).program, checkpoint


def run(entry: OnnxEntry, program: Program, checkpoint: Checkpoint) -> dict[str, Tensor]:
    values = {parameter_of(p.name): as_torch(load(p, checkpoint), p.type.dtype) for p in entry.parameters}
    return OnnxRunner(entry, values).run(arguments(entry, program, vocabulary=97, width=64))


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (value - found[name]).abs().max() <= 1e-5 * max(1.0, float(value.abs().max())), name


@pytest.mark.parametrize("formats", [QUANTIZED, FP8_EXPERTS], ids=["nvfp4 experts", "fp8 experts"])
@pytest.mark.parametrize("lacks", [ADA, AMPERE], ids=["Ada", "Ampere"])
def test_the_same_as_on_blackwell(lacks: tuple[DType, ...], formats: str, tmp_path: Path) -> None:
    """Logits and states of few tokens agree."""
    *programs, checkpoint = opened(formats, tmp_path, lacks)
    for name in ("decode", "verify", "draft"):
        native, tabled = (emit_entry(program, name, batch=BATCH) for program in programs)
        assert not {b.dtype for b in tabled.weights} & {dtype.value for dtype in lacks}
        compare(run(tabled, programs[0], checkpoint), run(native, programs[0], checkpoint))


def test_prefill_is_weight_only(tmp_path: Path) -> None:
    """It agrees with the reference."""
    program, packed, checkpoint = opened(QUANTIZED, tmp_path, AMPERE)
    entry = emit_entry(packed, "prefill", batch=BATCH)
    values = arguments(entry, program, vocabulary=97, width=64)
    states = {b.name: values[b.name] for b in entry.arguments if b.kind == "state"}
    inputs = {b.name: values[b.name] for b in entry.arguments if b.kind == "input"}
    result = evaluate(program, "prefill", inputs, load_parameters(program, checkpoint), states)
    outputs = dict(zip(program.entry_points["prefill"].outputs, result.outputs, strict=True))
    compare(run(entry, program, checkpoint), outputs | {name: result.states[name].float() for name in states})


def test_a_gpu_rounds_to_the_types_that_it_has() -> None:
    """Where weights come through tables they are multiplied with activations as they are."""
    for lacks, rounded in (((), {"nvfp4", "fp8"}), (ADA, {"fp8"}), (AMPERE, set[str]())):
        program = serve(small_spec(QUANTIZED, odd=SERVING), lacking=lacks).program
        nodes = [node for function in program.functions.values() for node in function.nodes]
        formats = {node.attributes.get(name, "") for node in nodes for name in ("format", "inner_format")}
        assert formats - {""} == rounded


def test_bytes_are_the_checkpoints_own(tmp_path: Path) -> None:
    """What is bound is the same memory in another type: plans of all GPUs share one copy."""
    program, packed, checkpoint = opened(QUANTIZED, tmp_path, AMPERE)
    native = {p.memory: p for p in emit_entry(program, "prefill", batch=1).parameters}
    changed = [p for p in emit_entry(packed, "prefill", batch=1).parameters if p.type != native[p.memory].type]
    assert {p.format for p in changed} == {"nvfp4", "fp8"}
    assert all(p.name == native[p.memory].name for p in changed)
    assert all(load(p, checkpoint).tobytes() == load(native[p.memory], checkpoint).tobytes() for p in changed)


def test_tables_are_the_types() -> None:
    """Place byte + 128 holds what ml_dtypes makes of the byte, taken as signed."""
    bytes_ = np.arange(256, dtype=np.uint8)
    places = bytes_.view(np.int8).astype(np.int32) + 128
    expected = bytes_.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    finite = np.isfinite(expected)
    assert finite.sum() == 254 and np.array_equal(e4m3_table()[places][finite], expected[finite])
    for table, nibbles in zip(nibble_tables(), (bytes_ & 15, bytes_ >> 4), strict=True):
        assert np.array_equal(table[places], nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float32))
