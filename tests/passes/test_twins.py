"""Each pass has a numeric twin: the program before and after gives the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.ir.program import Program
from n3c.ir.source import Fp8, Nvfp4
from n3c.ir.types import DType
from n3c.passes.base import run_pipeline
from n3c.passes.cleanup import Cleanup
from n3c.passes.fuse_moe import FuseMoe
from n3c.passes.lower.model import lower
from n3c.passes.pipelines import quantize_pass, serving_passes
from n3c.passes.plan_state import PlanState
from n3c.passes.serving import serve
from n3c.runtime.engines.reference.evaluate import evaluate, zero_states
from n3c.runtime.engines.reference.ops import dequantize_fp8, dequantize_nvfp4
from n3c.specs.schema import Spec
from support.programs import load_parameters, random_tensors, save_tensors
from support.specs import QUANTIZED, small_spec

IDS = torch.tensor([[3, 14, 15, 92, 65, 35, 8, 9, 79], [2, 7, 18, 28, 18, 28, 4, 59, 0]])

PLACES = {"key_positions": torch.arange(16)}


@pytest.fixture(params=[True, False], ids=["latent", "standard"])
def spec(request: pytest.FixtureRequest) -> Spec:
    return small_spec(QUANTIZED.replace('"mtp.*"', '"mtp.moe.router"'), latent=request.param)


@pytest.fixture
def checkpoint(spec: Spec, tmp_path: Path) -> Checkpoint:
    return save_tensors(random_tensors(lower(spec)), tmp_path / "checkpoint")


def forward(program: Program, checkpoint: Checkpoint) -> tuple[Tensor, ...]:
    return evaluate(program, "forward", {"input_ids": IDS}, load_parameters(program, checkpoint)).outputs


def test_quantize_equals_the_dequantized_weights(spec: Spec, checkpoint: Checkpoint) -> None:
    """Only linears move, and the quantized program is the plain one over dequantized weights."""
    plain, quantized = lower(spec), lower(spec)
    assert quantize_pass(spec).run(quantized)
    stored = load_parameters(quantized, checkpoint)
    weights = load_parameters(plain, checkpoint)
    moved = 0
    for name, parameter in quantized.parameters.items():
        if isinstance(parameter.source, Nvfp4 | Fp8) and parameter.source.part == "codes":
            codes, scale = stored[name], stored[f"{name}_scale"]
            if isinstance(parameter.source, Nvfp4):
                weights[name] = dequantize_nvfp4(codes, scale, stored[f"{name}_scale_2"])
            else:
                weights[name] = dequantize_fp8(codes, scale)
            moved += 1
    assert moved > 10
    expected = evaluate(plain, "forward", {"input_ids": IDS}, weights).outputs
    actual = evaluate(quantized, "forward", {"input_ids": IDS}, stored).outputs
    assert len(actual) == 3  # the logits, and those of two MTP steps
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
    plain_logits = forward(plain, checkpoint)[0]
    assert 1e-3 < (plain_logits - actual[0]).abs().max() < plain_logits.abs().max()


@pytest.mark.parametrize("merge", [True, False])
def test_fuse_moe_changes_no_number(spec: Spec, checkpoint: Checkpoint, merge: bool) -> None:
    before, after = lower(spec), lower(spec)
    for program in (before, after):
        quantize_pass(spec).run(program)
    run_pipeline(after, [FuseMoe(merge_linears=merge)])
    ops_after = {node.op.name for function in after.functions.values() for node in function.nodes}
    assert "experts" not in ops_after and "expert_linear" in ops_after
    assert any("+" in name for name in after.parameters) == merge
    for a, e in zip(forward(after, checkpoint), forward(before, checkpoint), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_fuse_moe_is_idempotent(spec: Spec) -> None:
    program = lower(spec)
    assert FuseMoe().run(program)
    assert not FuseMoe().run(program)


def test_plan_state_decodes_what_forward_sees(spec: Spec, checkpoint: Checkpoint) -> None:
    """Tokens one by one, and in pieces, through the states give the logits of the whole sequence."""
    whole, stateful = lower(spec), lower(spec)
    run_pipeline(stateful, [PlanState(max_seq_len=16, kv_dtype=DType.F32, conv_dtype=DType.F32)])
    parameters = load_parameters(stateful, checkpoint)
    expected = forward(whole, checkpoint)[0]
    for pieces in ([1] * 9, [4, 1, 3, 1]):
        states, start, logits = zero_states(stateful, 2), 0, list[Tensor]()
        for size in pieces:
            inputs = {"input_ids": IDS[:, start : start + size], "lengths": torch.full((2,), start), **PLACES}
            result = evaluate(stateful, "decode", inputs, parameters, states)
            states, start = result.states, start + size
            logits.append(result.outputs[0])
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-4, atol=1e-5)


def test_a_state_read_one_token_late_is_seen(spec: Spec, checkpoint: Checkpoint) -> None:
    served = serve(spec).program
    parameters = load_parameters(served, checkpoint)
    first = evaluate(
        served,
        "decode",
        {"input_ids": IDS[:, :1], "lengths": torch.zeros(2, dtype=torch.int64), **PLACES},
        parameters,
        zero_states(served, 2, "decode"),
    )
    inputs = {"input_ids": IDS[:, 1:2], "lengths": torch.ones(2, dtype=torch.int64), **PLACES}
    right = evaluate(served, "decode", inputs, parameters, first.states).outputs[0]
    for name in first.states:
        late = first.states | {name: zero_states(served, 2)[name]}
        assert (evaluate(served, "decode", inputs, parameters, late).outputs[0] - right).abs().max() > 1e-4, name


def test_cleanup_changes_no_number(spec: Spec, checkpoint: Checkpoint) -> None:
    before, after = lower(spec), lower(spec)
    for program in (before, after):
        run_pipeline(program, serving_passes(spec)[:-1])
    assert Cleanup().run(after)
    assert len(after.parameters) < len(before.parameters)
    assert not Cleanup().run(after)
    inputs = {"input_ids": IDS, "lengths": torch.zeros(2, dtype=torch.int64), **PLACES}
    results = [
        evaluate(p, "decode", inputs, load_parameters(p, checkpoint), zero_states(p, 2)).outputs[0]
        for p in (before, after)
    ]
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
