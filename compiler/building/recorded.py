"""The options of a build in its manifest, `builds`: for each target that `OUT` holds, what it was built with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from n3c.backends.added import added_backends
from n3c.backends.trt.targets import sm_versions
from n3c.compiler.common_options import Target
from n3c.ir.diagnostics import N3CError
from n3c.ir.json_file import is_count

from .request import Entry, Request, WeightsMode

BUILDS = "builds"


def record(request: Request) -> dict[str, Any]:
    """Return the options of `request` that shape its target; no path, so that no machine shows in a manifest."""
    if request.target not in ("onnx", "trt"):
        return {}
    graphs = {"entry": list(request.entries), "stages": request.stages, "weights_mode": request.weights_mode}
    return graphs if request.target == "onnx" else {"trt": request.trt, "sm": list(request.sms), **graphs}


@dataclass(frozen=True, slots=True)
class Recorded:
    """A target, and the options that it was built with."""

    target: Target
    options: Mapping[str, Any]

    @property
    def weights_mode(self) -> WeightsMode:
        """Whether weights are inputs of what was built, or inside."""
        return "embedded" if self.options.get("weights_mode") == "embedded" else "bound"

    def arguments(self, weights: Path | str | None) -> dict[str, Any]:
        """Return the arguments of `build` to make it anew; the checkpoint is asked for where weights are inside."""
        inside = {"weights": weights} if self.weights_mode == "embedded" else {}
        anew = {"no_cache": True} if self.target == "trt" else {}
        return {"target": self.target, **self.options, **inside, **anew}


def recorded(manifest: Mapping[str, Any]) -> tuple[Recorded, ...] | None:
    """Return what a manifest records, in the order of building; None where there is no record or it makes no sense."""
    builds = manifest.get(BUILDS)
    if not isinstance(builds, dict) or not builds:
        return None
    rows = cast("dict[str, object]", builds)
    return tuple(Recorded(cast("Target", t), cast("Any", o)) for t, o in rows.items()) if _sound(rows) else None


def _sound(builds: Mapping[str, object]) -> bool:
    """Whether these are records that `record` makes."""
    for target, options in builds.items():
        if not isinstance(options, dict):
            return False
        given = cast("dict[str, Any]", options)
        keys = {"torch": set[str](), "onnx": _GRAPHS, "trt": _GRAPHS | {"trt", "sm"}}.get(target)
        if keys is None and target in added_backends():
            keys = set()
        if set(given) != keys or (keys and not _sound_graphs(given)) or ("sm" in given and not _sound_plans(given)):
            return False
    return True


_GRAPHS = {"entry", "stages", "weights_mode"}


def _sound_graphs(given: Mapping[str, Any]) -> bool:
    entries = given["entry"]
    return (
        isinstance(entries, list)
        and all(entry in get_args(Entry) for entry in cast("list[object]", entries))
        and is_count(given["stages"], 64)
        and given["stages"] > 0
        and given["weights_mode"] in get_args(WeightsMode)
    )


def _sound_plans(given: Mapping[str, Any]) -> bool:
    if given["trt"] not in ("rtx", "full") or not isinstance(given["sm"], list):
        return False
    sms = cast("list[object]", given["sm"])
    try:
        return all(is_count(sm) for sm in sms) and tuple(sms) == sm_versions(cast("list[int]", sms))
    except N3CError:
        return False
