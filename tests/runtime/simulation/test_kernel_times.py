"""The times of ops on a card: against whole steps that were measured, and where audits are moved to other contexts."""

from __future__ import annotations

import pytest

from n3c.backends.gpus import GPUS
from n3c.passes.serving import serve
from n3c.runtime.simulation.call_times import PlanTimes
from n3c.runtime.simulation.kernel_times import KernelTimes
from n3c.specs.load import loaded
from n3c.specs.shipped import spec_file

LONG = ("serving.max_seq_len=131072", "serving.prefill_chunk=2048")
WEIGHT_ONLY = ('serving.activations="weight_only"',)
BF16 = ('quantization.format="bf16"', "quantization.rules=[]")


def times(name: str, gpu: str, *overrides: str) -> KernelTimes:
    spec, _ = loaded(spec_file(name), overrides)
    return KernelTimes(serve(spec).program, GPUS[gpu], spec.model.vocab_size)


@pytest.mark.parametrize(
    ("overrides", "entry", "batch", "context", "measured_ms"),
    [
        ((), "decode", 1, 1024, 2.52),
        ((), "decode", 8, 32768, 5.93),
        (WEIGHT_ONLY, "decode", 1, 1024, 2.20),
        (WEIGHT_ONLY, "decode", 1, 32768, 2.29),
        (WEIGHT_ONLY, "decode", 8, 1024, 5.04),
        (WEIGHT_ONLY, "decode", 8, 32768, 5.60),
        (BF16, "decode", 1, 1024, 3.29),
        (BF16, "decode", 1, 32768, 3.38),
        (BF16, "decode", 8, 1024, 9.25),
        (BF16, "decode", 32, 32768, 19.85),
        (BF16, "prefill", 1, 2048, 55.0),
    ],
)
def test_steps_of_nano_that_an_h100_was_measured_at(
    overrides: tuple[str, ...], entry: str, batch: int, context: int, measured_ms: float
) -> None:
    """docs/hardware.md; no step is off by more than a fifth."""
    found = times("nano", "H100 SXM", *LONG, *overrides).call(entry, batch, context)
    assert found * 1e3 == pytest.approx(measured_ms, rel=0.2)


def test_a_call_takes_longer_with_context_and_sequences() -> None:
    super_ = times("super", "B200", *LONG)
    for entry in ("decode", "verify", "draft", "prefill"):
        assert super_.call(entry, 1, 2048) < super_.call(entry, 1, 131072)
        assert super_.call(entry, 1, 2048) < super_.call(entry, 4, 2048)
    assert super_.call("verify", 1, 4096) < 4 * super_.call("decode", 1, 4096)


def test_an_audit_is_moved_to_the_context_of_the_call() -> None:
    kernels = times("super", "B200", *LONG)
    plans = PlanTimes(kernels, {"decode.b1": 0.05, "prefill.b1": 0.3}, context=4096)
    assert plans.call("decode", 1, 4096, 1) == pytest.approx(0.05)
    further = kernels.call("decode", 1, 65536) - kernels.call("decode", 1, 4096)
    assert plans.call("decode", 1, 65536, 1) == pytest.approx(0.05 + further)
    assert plans.call("verify", 8, 4096, 3) == kernels.call("verify", 8, 4096)


@pytest.mark.parametrize("audited", [{}, {"prefill.b1": 0.3}])
def test_sequences_that_read_take_turns(audited: dict[str, float]) -> None:
    """As `TrtEngine` runs a plan of one sequence for each that has tokens; the batch size does not matter."""
    plans = PlanTimes(times("super", "B200", *LONG), audited, context=4096)
    one = plans.call("prefill", 1, 4096, 1)
    assert one == pytest.approx(0.3 if audited else plans.kernels.call("prefill", 1, 4096))
    assert [plans.call("prefill", 8, 4096, fed) for fed in (3, 8)] == [3 * one, 8 * one]
