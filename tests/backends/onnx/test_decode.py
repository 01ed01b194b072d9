"""The decode graph of whole small models: the very file an engine is built from, token by token."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

import onnx
import pytest
import torch

from n3c.backends.onnx.bindings import BYTES, parameter_of
from n3c.backends.onnx.emit import emit_entry
from n3c.backends.onnx.stages import stages
from n3c.ir.types import DType
from n3c.passes.lower.model import lower
from n3c.passes.serving import serve
from n3c.runtime.engines.reference.evaluate import evaluate, zero_states
from n3c.specs.load import load_spec
from n3c.specs.schema import Spec
from support.onnx_run import OnnxRunner
from support.programs import load_parameters, random_tensors, save_tensors
from support.progress import Recorded
from support.specs import QUANTIZED, SPECS, small_spec


def decode(spec: Spec, folder: Path, *, steps: int, batch: int = 2) -> float:
    """Decode random tokens with ONNX and with the reference, each from its own states; the largest difference.

    The sequences begin at different lengths, as if one had run for longer. Relative to the largest logit.
    """
    program = serve(spec).program
    parameters = load_parameters(program, save_tensors(random_tensors(lower(spec)), folder))
    runner = OnnxRunner(emit_entry(program, "decode", batch=batch), parameters)
    theirs, ours = zero_states(program, batch, "decode"), zero_states(program, batch, "decode")
    lengths = torch.arange(batch) * 2
    generator, worst = torch.Generator().manual_seed(1), 0.0
    for _ in range(steps):
        ids = torch.randint(0, spec.model.vocab_size, (batch, 1), generator=generator)
        inputs = {"input_ids": ids, "lengths": lengths, "key_positions": torch.arange(spec.serving.max_seq_len)}
        expected = evaluate(program, "decode", inputs, parameters, theirs)
        outputs = runner.run({**inputs, **ours})
        logits, theirs = expected.outputs[0], expected.states
        worst = max(worst, float((outputs["logits"] - logits).abs().max() / logits.abs().max()))
        ours = {name: outputs[name].to(state.dtype) for name, state in ours.items()}
        lengths = lengths + 1
    return worst


@pytest.mark.parametrize("latent", [True, False], ids=["latent", "standard"])
@pytest.mark.parametrize("formats", ["", QUANTIZED], ids=["bf16", "quantized"])
def test_decode_equals_the_reference(formats: str, latent: bool, tmp_path: Path) -> None:
    """Every block kind, grouped router, and 9 tokens; float32 states, so only the order of sums differs."""
    assert decode(small_spec(formats, latent=latent), tmp_path, steps=9) < 2e-5


def test_decode_with_the_states_that_are_deployed(tmp_path: Path) -> None:
    """BF16 caches and window, FP16 SSM state: rounding differs where a value is near a tie."""
    spec = small_spec(QUANTIZED)
    serving = replace(spec.serving, kv_cache_dtype="bf16", conv_state_dtype="bf16", ssm_state_dtype="fp16")
    assert decode(replace(spec, serving=serving), tmp_path, steps=4) < 3e-2


@pytest.mark.parametrize("name", ["tiny", "tiny-moe"])
def test_decode_of_the_shipped_tiny_specs(name: str, tmp_path: Path) -> None:
    spec, _ = load_spec(SPECS / f"{name}.toml")
    assert decode(spec, tmp_path, steps=2, batch=1) < 2e-5


def test_the_graph_is_valid_onnx_and_deterministic() -> None:
    program = serve(small_spec(QUANTIZED)).program
    entry = emit_entry(program, "decode", batch=3)
    data = entry.to_bytes()
    onnx.checker.check_model(onnx.load_from_string(data), full_check=True)
    assert data == emit_entry(serve(small_spec(QUANTIZED)).program, "decode", batch=3).to_bytes()


def test_weights_and_states_are_inputs_that_the_bindings_describe() -> None:
    program = serve(small_spec(QUANTIZED)).program
    entry = emit_entry(program, "decode", batch=3)
    graph = onnx.load_from_string(entry.to_bytes()).graph
    rows = [*entry.inputs, *entry.bindings]
    assert [value.name for value in graph.input] == [row["name"] for row in rows]
    assert [value.name for value in graph.output] == [row["name"] for row in entry.outputs]
    for value, row in zip((*graph.input, *graph.output), (*rows, *entry.outputs), strict=True):
        assert [d.dim_value or -1 for d in value.type.tensor_type.shape.dim] == row["shape"]
    calls = program.entry_points["decode"].calls
    assert {parameter_of(row["name"]) for row in entry.bindings} == {name for call in calls for name in call.parameters}
    assert {row["source"] for row in entry.outputs} == {"logits", *(name for call in calls for name in call.states)}
    assert max(len(tensor.raw_data) for tensor in graph.initializer) <= 1024  # tables and shapes, no weights
    codes = next(row for row in entry.bindings if row["name"].endswith(f"experts.*.up_proj.weight{BYTES}"))
    assert (codes["dtype"], codes["shape"]) == ("i8", [8, 48, 2, 8])
    assert codes["source"].startswith("bytes(nvfp4_codes(stack(")


def test_a_weight_that_is_read_as_bytes_is_the_memory_of_the_parameter() -> None:
    """Engines find the values by the parameter's name, and share its buffer with what binds it as it is stored."""
    program = serve(load_spec(SPECS / "nano.toml")[0]).program
    bound = [b for b in emit_entry(program, "decode", batch=1).weights if b.name.endswith(BYTES)]
    assert {b.name.rpartition(".mixer.")[2] for b in bound} >= {f"in_proj.weight{BYTES}", f"out_proj.weight{BYTES}"}
    for binding in bound:
        parameter = program.parameters[binding.name.removesuffix(BYTES)]
        assert parameter.type.dtype in (DType.F4E2M1, DType.F8E4M3)
        assert (binding.memory, binding.dtype) == (parameter.memory, "i8")
        assert prod(binding.shape) == parameter.type.bytes


def test_progress_and_places() -> None:
    program, recorded = serve(small_spec()).program, Recorded()
    entry = emit_entry(program, "decode", batch=1, progress=recorded)
    calls = program.entry_points["decode"].calls
    assert recorded.steps == [(call.label, i + 1, len(calls)) for i, call in enumerate(calls)]
    span = entry.locate("backbone.layers.3/Attention")
    assert span is not None and span.source is not None and "pattern" in span.source
    assert entry.locate("nowhere") is None


def test_linears_name_modules_inputs_and_formats() -> None:
    program = serve(small_spec(QUANTIZED)).program
    entry = emit_entry(program, "decode", batch=3)
    linears = {linear.name: linear for linear in entry.linears}
    assert len(linears) == len(entry.linears)
    up = linears["backbone.layers.1.mixer.experts.*.up_proj"]
    assert (up.requested, up.selected, up.total) == ("nvfp4", 3 * 3 * 48 * 32, 8 * 48 * 32)
    assert linears["backbone.layers.0.mixer.in_proj"].requested == "fp8"
    assert linears["lm_head"].requested == "bf16"
    q, k = linears["backbone.layers.3.mixer.q_proj"], linears["backbone.layers.3.mixer.k_proj"]
    assert q.weight == k.weight and q.total == (64 + 32 + 32) * 64  # merged by fuse_moe
    assert {linear.weight.removesuffix(BYTES) for linear in entry.linears} <= set(program.parameters)


@pytest.mark.parametrize("starts", [(0,), (0, 3, 6), (0, 1, 2, 3, 4, 5, 6, 7)])
def test_stages_in_a_chain_are_the_whole(starts: tuple[int, ...], tmp_path: Path) -> None:
    spec = small_spec(QUANTIZED)
    program = serve(spec).program
    whole = program.entry_points["decode"]
    parameters = load_parameters(program, save_tensors(random_tensors(lower(spec)), tmp_path))
    inputs = {"input_ids": torch.tensor([[5], [6]]), "lengths": torch.tensor([0, 3])}
    known = {**inputs, "key_positions": torch.arange(4), **zero_states(program, 2, "decode")}
    expected = OnnxRunner(emit_entry(program, "decode", batch=2), parameters).run(known)
    parts = [part for _, part in stages(program, whole, starts)]
    assert [call for part in parts for call in part.calls] == whole.calls
    assert len(parts) == len(starts)
    results: dict[str, torch.Tensor] = {}
    for part in parts:
        entry = emit_entry(program, part, batch=2)
        results |= OnnxRunner(entry, parameters).run(known | results)
    for name, value in expected.items():
        torch.testing.assert_close(results[name], value, rtol=0, atol=0)
