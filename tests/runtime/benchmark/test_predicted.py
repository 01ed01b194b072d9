"""Predicted times: read back from audit.json, whatever that says, and told for the requests that are measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from n3c.runtime.benchmark.predicted import Predicted, predicted
from n3c.runtime.predicted import PredictedTime, predicted_times
from n3c.specs.schema import Serving
from support.command import n3c, write_small

TIMES = {
    "prefill.b1": {"RTX 5090": PredictedTime(500.0, 250.0, "memory")},
    "decode.b2": {"RTX 5090": PredictedTime(100.0, 50.0, "L1"), "RTX PRO 6000": PredictedTime(90.0, 50.0, "L1")},
    "verify.b2": {"RTX 5090": PredictedTime(200.0, 50.0, "L1")},
    "draft.b2": {"RTX 5090": PredictedTime(20.0, 50.0, "L1")},
}
SERVING = Serving(prefill_chunk=100, draft_tokens=3)


def told(device: str, batch: int = 2, context: int = 250, speculative: bool = False) -> Predicted | None:
    return predicted(
        TIMES, device, SERVING, batch=batch, context=context, speculative=speculative, acceptance_length=2.0
    )


def test_a_token_of_the_gpu_at_hand_or_of_the_largest() -> None:
    at_hand = told("NVIDIA GeForce RTX 5090")
    assert at_hand == Predicted("RTX 5090", 3.0, 0.05)  # 2 prompts of 3 chunks; a round gives 2 tokens
    assert told("x86_64") == Predicted("RTX PRO 6000", None, 0.045)
    assert told("x86_64", batch=3) is None
    assert told("x86_64", speculative=True) == Predicted("RTX 5090", 3.0, 0.13)
    assert at_hand is not None
    assert at_hand.as_json() == {"gpu": "RTX 5090", "time_to_first_token_ms": 3.0, "time_per_token_ms": 0.05}


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"time": 3}', '{"time": {"decode.b1": {"X": {"predicted_us": "1"}}}}', '{"time": {"decode.b1": []}}'],
)
def test_an_audit_that_says_nothing(text: str, tmp_path: Path) -> None:
    assert predicted_times(tmp_path) == {}
    (tmp_path / "trt").mkdir()
    (tmp_path / "trt" / "audit.json").write_text(text, encoding="utf-8")
    assert predicted_times(tmp_path) == {}


def test_a_build_tells_its_times(tmp_path: Path) -> None:
    spec, out = write_small(tmp_path), tmp_path / "out"
    arguments = ("--target", "trt", "--entry", "decode", "--sm", "86,120", "--set", "serving.batch_sizes=[1]")
    built = n3c("build", spec, "-o", out, "--json", *arguments)
    assert built.code == 0, built.err
    audit = json.loads((out / "trt" / "audit.json").read_text(encoding="utf-8"))
    assert built.data["time"] == audit["time"]
    times = predicted_times(out)["decode.b1"]
    assert {"RTX 3090", "RTX 5090"} <= set(times)
    assert "RTX 4090" not in times
    told = n3c("inspect", out, "--json").data["time"]["decode.b1"]["RTX 3090"]
    assert told.pop("ratio") == pytest.approx(audit["time"]["decode.b1"]["RTX 3090"]["ratio"], rel=0.02)  # rounded
    assert told == {key: audit["time"]["decode.b1"]["RTX 3090"][key] for key in told}
    assert "RTX 3090" in n3c("inspect", out).out
