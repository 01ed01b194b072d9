"""The plans of a build, opened as `--device cuda` opens them, with TensorRT's runtime played by an ONNX evaluator."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from n3c.backends.hashing import sha256_file
from n3c.backends.onnx.bindings import BYTES, Binding, parameter_of, read_bindings
from n3c.backends.onnx.linear_forms import Applied, Choose, LinearForm
from n3c.backends.trt.plan_file import Sidecar, write_sidecar
from n3c.ir.program import Program
from n3c.passes.lower.model import lower
from n3c.runtime.build_folder import OpenedBuild, open_build
from n3c.runtime.engines.interface import Engine
from n3c.runtime.engines.onnxruntime.open import cpu_engine
from n3c.runtime.engines.tensorrt.memory import bytes_of
from n3c.runtime.engines.tensorrt.open import cuda_engine
from n3c.runtime.generation.capacity import Capacity
from n3c.runtime.generation.loop import Generation
from n3c.runtime.generation.sequence import Options
from support.command import n3c, write_small
from support.fake_trt import FakeTrt, HostDevice
from support.programs import random_tensors, save_tensors
from support.specs import QUANTIZED

ENTRIES = ("prefill", "decode")
PROMPTS = ([1, 2, 3, 4, 5], [11])
BATCH = len(PROMPTS)
SERVING = ("max_seq_len = 32", 'max_seq_len = 32\nprefill_chunk = 4\nactivations = "weight_only"\nbatch_sizes = [2]')


def sums_in_decode(applied: Applied) -> LinearForm:
    return "sum" if applied.exact else "product"


def choose(program: Program, sms: Sequence[int]) -> Choose:
    return sums_in_decode


def weights_of(build: OpenedBuild, entry: str) -> dict[str, Binding]:
    entries = read_bindings(build.out / "trt/bindings.json").entries
    return {row.name: row for key, of in entries.items() if key.startswith(f"{entry}.") for row in of.weights}


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OpenedBuild:
    """A build whose decode reads every NVFP4 weight as bytes, and whose prefill multiplies what is stored."""
    monkeypatch.setattr("n3c.backends.onnx.linear_forms.LEAST_IN_PLANES", 16)
    monkeypatch.setattr("n3c.compiler.building.plans.fastest_for", choose)
    spec = write_small(tmp_path, SERVING, ('"MEM*E-ME"', '"ME*-"'), extra=QUANTIZED.rpartition("[[")[0])
    entries = [argument for entry in ENTRIES for argument in ("--entry", entry)]
    result = n3c("build", spec, "--target", "onnx", "-o", tmp_path / "out", *entries)
    assert result.code == 0, result.err
    opened = open_build(tmp_path / "out")
    (opened.out / "trt").mkdir()
    shutil.copy(opened.out / "onnx/bindings.json", opened.out / "trt")
    opened.manifest["files"].append({"path": "trt/bindings.json"})
    sha256 = opened.manifest["spec"]["sha256"]
    for key, of in read_bindings(opened.out / "trt/bindings.json").entries.items():
        plan = opened.out / f"trt/{key}.plan"
        shutil.copy(opened.out / of.onnx, plan)
        sizes = (plan.stat().st_size, sha256_file(plan))
        write_sidecar(plan, Sidecar(key, None, "rtx", FakeTrt.__version__, (120,), *sizes, sha256, "bound"))
    return opened


def generate(engine: Engine, build: OpenedBuild) -> list[list[int]]:
    generation = Generation(engine, PROMPTS, Options(max_new_tokens=3), Capacity.of(build.spec))
    generation.run()
    return [sequence.new for sequence in generation.sequences]


def test_a_weight_is_held_once_that_plans_read_as_stored_and_as_bytes(build: OpenedBuild, tmp_path: Path) -> None:
    """Of linears and of experts; what the plans compute of that memory is what the float32 rendering does."""
    decode, prefill = weights_of(build, "decode"), weights_of(build, "prefill")
    as_bytes = {name: row for name, row in decode.items() if name.endswith(BYTES)}
    assert {".experts." in name for name in as_bytes} == {True, False}
    for name, row in as_bytes.items():
        stored = prefill[parameter_of(name)]
        assert (row.dtype, stored.dtype in ("f4e2m1", "f8e4m3"), row.memory) == ("i8", True, stored.memory)
    assert not any(row.dtype == "f4e2m1" for row in decode.values())

    checkpoints = [save_tensors(random_tensors(lower(build.spec), seed=n), tmp_path / str(n)) for n in (0, 5)]
    engine = cuda_engine(build, ENTRIES, [BATCH], checkpoints[0], devices=[HostDevice()], trt=FakeTrt())
    held = {row.memory: bytes_of(row, row.shape) for row in (*decode.values(), *prefill.values())}
    assert engine.allocated().weights == sum(held.values())
    results: list[list[list[int]]] = []
    for checkpoint in checkpoints:
        engine.replace_weights(checkpoint)
        results.append(generate(engine, build))
        assert results[-1] == generate(cpu_engine(build.served, build.spec, ENTRIES, [BATCH], checkpoint), build)
    assert results[0] != results[1]
