"""The times that the audit of a build predicts, read back from its audit.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from n3c.ir.json_file import read_json

AUDIT = "trt/audit.json"


@dataclass(frozen=True, slots=True)
class PredictedTime:
    """Of one call of an entry point at one batch size, on one GPU."""

    microseconds: float
    roofline_microseconds: float
    bound_by: str

    @property
    def ratio(self) -> float:
        """The time over that of the roofline."""
        return self.microseconds / self.roofline_microseconds

    def as_json(self) -> dict[str, Any]:
        """Return the form of audit.json."""
        return {
            "predicted_us": self.microseconds,
            "roofline_us": self.roofline_microseconds,
            "ratio": round(self.ratio, 3),
            "bound_by": self.bound_by,
        }


def predicted_times(out: Path) -> dict[str, dict[str, PredictedTime]]:
    """Return entry point and batch size (`decode.b1`) → GPU → time; nothing of a build without an audit of plans."""
    try:
        data = read_json(out / AUDIT)
    except (OSError, ValueError):
        return {}
    found: dict[str, dict[str, PredictedTime]] = {}
    for entry, by_gpu in _table(_table(data).get("time")).items():
        for gpu, row in _table(by_gpu).items():
            time = _time(_table(row))
            if time is not None:
                found.setdefault(entry, {})[gpu] = time
    return found


def audited_context(out: Path) -> int:
    """Return the tokens of context that the audit of a build counts with; 1 where it does not tell."""
    try:
        data = read_json(out / AUDIT)
    except (OSError, ValueError):
        return 1
    for row in _table(_table(_table(data).get("traffic")).get("entries")).values():
        context = _table(row).get("context")
        if isinstance(context, int) and context > 0:
            return context
    return 1


def _table(value: object) -> Mapping[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _time(row: Mapping[str, Any]) -> PredictedTime | None:
    predicted, roofline, bound = (row.get(key) for key in ("predicted_us", "roofline_us", "bound_by"))
    if isinstance(predicted, float) and isinstance(roofline, float) and roofline > 0 and isinstance(bound, str):
        return PredictedTime(predicted, roofline, bound)
    return None
