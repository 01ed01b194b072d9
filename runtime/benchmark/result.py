"""The figures of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .predicted import Predicted


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of times, in milliseconds."""

    p50: float
    p90: float
    p99: float

    @staticmethod
    def of(seconds: Sequence[float]) -> Percentiles:
        """Return those of times in seconds."""
        import numpy as np

        p50, p90, p99 = (float(value) * 1000 for value in np.percentile(seconds, (50, 90, 99)))
        return Percentiles(p50, p90, p99)

    def as_json(self) -> dict[str, float]:
        """Return the figures by name."""
        return {"p50": round(self.p50, 4), "p90": round(self.p90, 4), "p99": round(self.p99, 4)}


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured for prompts of one length, as many at once as the engine takes."""

    batch: int
    context: int
    """Tokens of each prompt."""
    time_to_first_token: Percentiles
    """From the request to the first token of every sequence, over the runs."""
    time_per_token: Percentiles
    """Of a sequence: the time of a round over the tokens that it gave each, over the rounds of all runs."""
    prefill_tokens_per_second: float
    """Prompt tokens of all sequences."""
    tokens_per_second: float
    """New tokens of all sequences together, after the first ones."""
    acceptance_length: float
    """Tokens a round of a sequence: 1 without speculation."""
    predicted: Predicted | None = None
    """What the audit of the build's plans predicts; None where there are none of this batch."""

    def as_json(self) -> dict[str, Any]:
        """Return the form of `n3c bench --json`, key `rows`."""
        return {
            "batch": self.batch,
            "context": self.context,
            "time_to_first_token_ms": self.time_to_first_token.as_json(),
            "time_per_token_ms": self.time_per_token.as_json(),
            "prefill_tokens_per_second": round(self.prefill_tokens_per_second, 3),
            "tokens_per_second": round(self.tokens_per_second, 3),
            "acceptance_length": round(self.acceptance_length, 4),
            "predicted": None if self.predicted is None else self.predicted.as_json(),
        }


@dataclass(frozen=True, slots=True)
class Benchmark:
    """How fast an engine runs a build."""

    build: Path
    weights: str
    """The checkpoint's directory, or which random weights were taken."""
    engine: str
    device: str
    device_name: str
    """The GPU's name; of a CPU its architecture."""
    speculative: bool
    rows: tuple[Row, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the form of `n3c bench --json`."""
        return {
            "ok": True,
            "weights": self.weights,
            "engine": self.engine,
            "device": self.device,
            "device_name": self.device_name,
            "speculative": self.speculative,
            "rows": [row.as_json() for row in self.rows],
            "diagnostics": [],
        }
