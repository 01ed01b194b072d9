"""The state plan: the published bytes, and a layout without overlaps."""

from __future__ import annotations

import pytest

from n3c.compiler.serving import serve
from n3c.passes.plan_state import ALIGNMENT
from n3c.specs.load import load_spec
from support.specs import SPECS, small_spec


@pytest.mark.parametrize(
    ("name", "kv_per_token", "per_request"),
    [
        ("nano", 6_144, 49_082_368),
        ("super", 8_192, 170_229_760),
        ("ultra", 12_288, 407_961_600),
        ("nemotron-nano-9b-v2", 16_384, 143_548_416),
        ("nemotron-h-8b", 16_384, 102_137_856),
    ],
)
def test_published_bytes(name: str, kv_per_token: int, per_request: int) -> None:
    """FP32 SSM state, BF16 convolution window and KV cache, as vLLM's and TensorRT-LLM's state calculators give."""
    plan = serve(load_spec(SPECS / f"{name}.toml")[0]).plan
    assert plan.kv_bytes_per_token == kv_per_token
    assert plan.bytes_per_request == per_request


def test_states_lie_apart_and_aligned() -> None:
    served = serve(small_spec())
    end = 0
    for state in served.plan.states:
        assert state.offset % ALIGNMENT == 0
        assert state.offset >= end
        end = state.offset + state.bytes
    assert served.plan.total_bytes >= end
    kinds = {state.kind for state in served.plan.states}
    assert kinds == {"kv", "conv", "ssm"}
    assert len(served.plan.states) == 2 * (3 + 1)  # three Mamba layers and one of attention, two states each


@pytest.mark.parametrize(("dtype", "name"), [("fp16", "f16"), ("bf16", "bf16"), ("fp32", "f32")])
def test_ssm_dtypes(dtype: str, name: str) -> None:
    spec = small_spec(odd=("max_seq_len = 32", f'max_seq_len = 32\nssm_state_dtype = "{dtype}"'))
    assert {s.dtype for s in serve(spec).plan.states if s.kind == "ssm"} == {name}
