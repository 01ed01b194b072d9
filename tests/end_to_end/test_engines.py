"""The decode graph, the very file that TensorRT gets, against the generated module and the reference evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from n3c.backends.onnx.bindings import Binding, parameter_of
from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.backends.torch.loading import load_package
from n3c.passes.serving import serve
from n3c.runtime.engines.reference.evaluate import evaluate, zero_states
from n3c.specs.load import load_spec
from support.command import n3c
from support.models import random_config
from support.onnx_run import FP4DynamicQuantize, from_numpy, to_numpy
from support.programs import load_parameters
from support.specs import SPECS

TOKENS, BATCH = 16, 4
PLACES = {"key_positions": torch.arange(TOKENS)}
OFF = ("--set", "quantization.format=bf16", "--set", "quantization.rules=[]")


def build(tmp_path: Path, *overrides: str) -> tuple[Path, Any, Path]:
    """Build tiny.toml for torch and trt into one output; return it, the module with weights, and a checkpoint."""
    spec, out = SPECS / "tiny.toml", tmp_path / "out"
    assert n3c("build", spec, "--target", "torch", "-o", out, *overrides).code == 0
    module = load_package(out / "torch")
    torch.manual_seed(0)
    model = module.Model().to(torch.bfloat16).float().eval()  # weights that BF16 holds exactly
    checkpoint = tmp_path / "checkpoint"
    module.save_checkpoint(model, checkpoint)
    arguments = ("--weights", checkpoint, "--entry", "decode", "-o", out, "--json")
    result = n3c("build", spec, "--target", "trt", *arguments, *overrides)
    assert result.code == 0, result.err
    assert (out / "torch/tiny/model.py").is_file()  # the other target is still there
    return out, model, checkpoint


def decode(out: Path, parameters: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Run OUT/onnx/decode.b4.onnx token by token, fed as bindings.json says; return the logits [B, S, V]."""
    bindings = json.loads((out / "trt" / "bindings.json").read_text())
    entry = bindings["entries"][f"decode.b{BATCH}"]
    session = ReferenceEvaluator(onnx.load(out / entry["onnx"]), new_ops=[FP4DynamicQuantize])
    rows = [Binding(**row | {"shape": tuple(row["shape"])}) for row in bindings["weights"]]
    feeds = {row.name: to_numpy(parameters[parameter_of(row.name)], row) for row in rows}
    inputs = [Binding(**row | {"shape": tuple(row["shape"])}) for row in entry["inputs"]]
    outputs = [Binding(**row | {"shape": tuple(row["shape"])}) for row in entry["outputs"]]
    states = {row.name: torch.zeros(row.shape) for row in inputs if row.kind == "state"}
    logits: list[Tensor] = []
    for t in range(ids.shape[1]):
        values = states | PLACES | {"input_ids": ids[:, t : t + 1], "lengths": torch.full((BATCH,), t)}
        found: Any = session.run(None, feeds | {row.name: to_numpy(values[row.name], row) for row in inputs})
        by_source = {row.source: from_numpy(array) for row, array in zip(outputs, found, strict=True)}
        states = {name: by_source[name] for name in states}
        logits.append(by_source["logits"])
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("quantized", [False, True], ids=["bf16", "nvfp4"])
def test_the_file_that_tensorrt_gets(quantized: bool, tmp_path: Path) -> None:
    overrides = () if quantized else OFF
    out, model, folder = build(tmp_path, *overrides)
    spec, _ = load_spec(out / "spec.toml")
    program = serve(spec).program
    parameters = load_parameters(program, Checkpoint(folder))
    ids = torch.randint(0, spec.model.vocab_size, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))
    actual = decode(out, parameters, ids)

    state = model.allocate_state(BATCH, TOKENS)
    with torch.no_grad():
        plain = torch.cat([model.step(ids[:, t : t + 1], state) for t in range(TOKENS)], dim=1)
    states, reference = zero_states(program, BATCH, "decode"), list[Tensor]()
    for t in range(TOKENS):
        inputs = PLACES | {"input_ids": ids[:, t : t + 1], "lengths": torch.full((BATCH,), t)}
        result = evaluate(program, "decode", inputs, parameters, states)
        states = result.states
        reference.append(result.outputs[0])
    assert (actual - torch.cat(reference, dim=1)).abs().max() <= 1e-4
    difference = (actual - plain).abs().max()
    if quantized:
        assert 1e-4 < difference < plain.abs().max()  # quantization shows, and is not noise
    else:
        assert difference <= 1e-4

    audit = json.loads((out / "trt" / "audit.json").read_text())
    assert audit["summary"]["mismatches"] == 0
    assert ("nvfp4" in audit["summary"]["realised"]) == quantized
    names = {file["path"] for file in json.loads((out / "manifest.json").read_text())["files"]}
    assert {"trt/decode.b1.plan", "trt/decode.b4.plan", "onnx/decode.onnx", "torch/tiny/model.py"} <= names


def test_stages_are_plans_of_their_own(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--stages", 3, "--entry", "decode", "--set", "serving.batch_sizes=[1]", "--json")
    result = n3c("build", SPECS / "tiny.toml", "--target", "trt", "-o", out, *arguments)
    assert result.code == 0, result.err
    assert sorted(p.name for p in (out / "trt").glob("*.plan")) == [f"decode.b1.s{i}.plan" for i in range(3)]
    audit = json.loads((out / "trt" / "audit.json").read_text())
    whole = len(serve(load_spec(SPECS / "tiny.toml")[0]).program.ledger)
    assert 0 < len(audit["linears"]) < whole
    assert len({row["name"] for row in audit["linears"]}) == len(audit["linears"])


@pytest.mark.parametrize(("seed", "entry"), [(0, "decode"), (4, "prefill"), (12, "decode")])
def test_odd_sizes_build(seed: int, entry: str, tmp_path: Path) -> None:
    """Random configurations, with head_dim 13 and the like: every plan builds and every precision is realised."""
    random_config(seed).save_pretrained(tmp_path)
    assert n3c("import", tmp_path, "-o", tmp_path / "spec.toml").code == 0
    out = tmp_path / "out"
    overrides = (
        "--set",
        "serving.batch_sizes=[2]",
        "--set",
        "serving.prefill_chunk=40",
    )  # sums and products of many rows
    arguments = ("--entry", entry, "-o", out, *overrides)
    result = n3c("build", tmp_path / "spec.toml", "--target", "trt", *arguments)
    assert result.code == 0, result.err
    audit = json.loads((out / "trt" / "audit.json").read_text())
    assert audit["linears"]
    assert audit["summary"]["mismatches"] == 0
