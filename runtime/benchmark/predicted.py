"""The times that a build's audit predicts for the requests that are measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from n3c.backends.gpus import GPUS, gpu_named
from n3c.runtime.predicted import PredictedTime
from n3c.specs.schema import Serving


@dataclass(frozen=True, slots=True)
class Predicted:
    """Of the plans on one GPU, in milliseconds: kernels alone, at the context that the audit states."""

    gpu: str
    first_token: float | None
    """Of the chunks of all prompts; None without a plan of prefill."""
    token: float
    """Of a sequence: a decode, or a round of drafts and their verification over the tokens that it gave."""

    def as_json(self) -> dict[str, Any]:
        """Return the form of `n3c bench --json`."""
        first = None if self.first_token is None else round(self.first_token, 4)
        return {"gpu": self.gpu, "time_to_first_token_ms": first, "time_per_token_ms": round(self.token, 4)}


def predicted(
    times: Mapping[str, Mapping[str, PredictedTime]],
    device_name: str,
    serving: Serving,
    *,
    batch: int,
    context: int,
    speculative: bool,
    acceptance_length: float,
) -> Predicted | None:
    """Return what `times` of a build say of requests on the GPU at hand, or else on the largest that they tell of."""
    names = [f"verify.b{batch}", f"draft.b{batch}"] if speculative else [f"decode.b{batch}"]
    told = set.intersection(*(set(times.get(name, ())) for name in names))
    if not told:
        return None
    at_hand = gpu_named(device_name)
    gpu = at_hand.name if at_hand and at_hand.name in told else max(told, key=lambda name: _memory(name))
    call = times[names[0]][gpu].microseconds
    if speculative:
        call += serving.draft_tokens * times[names[1]][gpu].microseconds
    chunk = times.get("prefill.b1", {}).get(gpu)
    chunks = batch * -(-context // serving.prefill_chunk)
    first = None if chunk is None else chunk.microseconds * chunks / 1000
    return Predicted(gpu, first, call / acceptance_length / 1000)


def _memory(name: str) -> int:
    return GPUS[name].memory if name in GPUS else 0
