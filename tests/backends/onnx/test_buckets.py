"""Experts over chunks of tokens: nothing is dropped, however a router loads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from n3c.backends.onnx.emit import emit_entry
from n3c.backends.onnx.entry_forms import bucket_rows
from n3c.ir import ops
from n3c.ir.types import DType
from n3c.passes.lower.model import lower
from n3c.passes.serving import serve
from n3c.runtime.engines.reference.ops import experts as all_experts
from support.one_op import OneOp
from support.onnx_run import OnnxRunner
from support.programs import load_parameters, random_tensors, save_tensors
from support.serving import RuntimeServed, Served
from support.specs import QUANTIZED, small_spec

TOKENS, EXPERTS, TOP_K = 96, 8, 2


def routing(name: str) -> Tensor:
    """Return the experts of each token, i64 [1, T, K]."""
    token = torch.arange(TOKENS)
    first, second = {
        "even": (token % EXPERTS, (token + 3) % EXPERTS),
        "all to the same": (torch.full_like(token, 5), torch.full_like(token, 2)),
        "all to one": (torch.full_like(token, 7), token % 7),
        "a bucket exactly full": (torch.where(token < 64, 0, 1 + token % 7), 1 + (token + 1) % 7),
    }[name]
    return torch.stack([first, second], -1).unsqueeze(0)


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
@pytest.mark.parametrize("name", ["even", "all to the same", "all to one", "a bucket exactly full"])
def test_routings(name: str, dtype: DType) -> None:
    one = OneOp()
    x = one.input("x", 1, TOKENS, 32)
    indices, weights = one.integers("indices", routing(name)), one.input("weights", 1, TOKENS, TOP_K)
    up, down = one.weight("up", EXPERTS, 16, 32, dtype=dtype), one.weight("down", EXPERTS, 32, 16, dtype=dtype)
    program = one.apply(ops.experts, x, indices, weights, up, down, inner_format="")
    actual = OnnxRunner(emit_entry(program, "run", batch=1), one.values).run(one.values)["y0"]
    v = one.values
    expected = all_experts(v["x"], v["indices"], v["weights"], v["up"], v["down"], inner_format="")
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)


def test_sizes_of_buckets() -> None:
    """Never more rows than tokens; twice the mean, in whole steps, where experts are many."""
    assert bucket_rows(TOKENS, TOP_K, EXPERTS) == 64
    assert bucket_rows(1024, 22, 512) == 96
    assert bucket_rows(2048, 22, 512) == 192
    assert bucket_rows(40, 4, 4) == 40
    assert bucket_rows(8, 1, 512) == 8


@pytest.mark.parametrize(("activations", "bound"), [("weight_only", 1e-4), ("as_format", 0.1)])
@pytest.mark.parametrize("skewed", [False, True])
def test_quantized_experts_of_a_whole_prefill(skewed: bool, activations: str, bound: float, tmp_path: Path) -> None:
    """In ONNX Runtime, with a full chunk, a part of one and an empty one, and a router that always chooses the same.

    Where activations are rounded, one rounding that tips moves all logits of the token; so the exact bound is of the
    weights alone.
    """
    chunk = (
        'max_seq_len = 64\nprefill_chunk = 40\nkv_cache_dtype = "fp32"\nconv_state_dtype = "fp32"\n'
        f'activations = "{activations}"'
    )
    plain = 'max_seq_len = 32\nkv_cache_dtype = "fp32"\nconv_state_dtype = "fp32"'
    spec = small_spec(QUANTIZED, odd=(plain, chunk))
    tensors = random_tensors(lower(spec))
    for name in [name for name in tensors if name.endswith("e_score_correction_bias") and skewed]:
        tensors[name] = torch.arange(len(tensors[name]), dtype=torch.float32) * 10
    program, checkpoint = serve(spec).program, save_tensors(tensors, tmp_path)
    assert spec.moe is not None
    assert bucket_rows(40, spec.moe.top_k, spec.moe.num_experts) < 40
    parameters = load_parameters(program, checkpoint)
    ours = RuntimeServed(program, checkpoint, 1)
    theirs = Served(program, parameters, 1)
    ids = torch.randint(0, 97, (1, 41), generator=torch.Generator().manual_seed(1))
    lengths = torch.zeros(1, dtype=torch.int64)
    for count in (40, 5, 0):
        counts = torch.tensor([count])
        inputs = {"input_ids": ids[:, :40], "following_ids": ids[:, 1:], "counts": counts, "lengths": lengths}
        expected, actual = theirs.call("prefill", **inputs), ours.call("prefill", **inputs)
        difference = float((actual["logits"] - expected["logits"]).abs().max() / expected["logits"].abs().max())
        assert difference < bound
        lengths = lengths + counts
