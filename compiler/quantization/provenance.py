"""Who made a quantized checkpoint of what: the command without its places, versions, and the hash of the spec."""

from __future__ import annotations

import hashlib
from dataclasses import fields
from pathlib import Path

from n3c.backends.modelopt.record import Provenance
from n3c.backends.safetensors.layout import MAX_SHARD_BYTES
from n3c.compiler.report.tool_versions import tool_versions
from n3c.runtime.options import flag
from n3c.specs.convert import checkpoint_name
from n3c.specs.dump import dump_spec
from n3c.specs.schema import Spec

from .request import CalibrationData, QuantizeRequest


def provenance(request: QuantizeRequest, spec: Spec) -> Provenance:
    """Return the provenance of what `request` makes; `spec` has the final formats."""
    return Provenance(
        name=spec.name,
        spec_sha256=hashlib.sha256(dump_spec(spec).encode()).hexdigest(),
        source=checkpoint_name(request.weights),
        command=command(request),
        versions=tool_versions(),
        in_transformers=all(kind.in_transformers for kind in spec.blocks),
    )


def command(request: QuantizeRequest) -> list[str]:
    """Return the options that decide the result, with the last part of each path.

    Where it is written, and whether it was resumed or made in parts, changes no byte.
    """
    words = ["n3c", "quantize"]
    if isinstance(request.spec, Path):
        words.append(request.spec.name)
    words += ["--weights", checkpoint_name(request.weights)]
    given = {
        "--fmt": request.fmt,
        "--block": request.block,
        "--search": None if request.search == "none" else request.search,
        "--like": _name(request.like),
        "--effective-bits": request.effective_bits,
        **_calibration(request.calibration),
        "--activation-scales": _name(request.activation_scales),
        "--multimodal": None if request.multimodal == "text" else request.multimodal,
        "--max-shard-size": None if request.max_shard_bytes == MAX_SHARD_BYTES else request.max_shard_bytes,
    }
    words += ["--auto"] * (request.effective_bits is not None) + ["--auto-mtp"] * request.mtp
    words += [word for option, value in given.items() if value is not None for word in (option, str(value))]
    return words + [word for override in request.overrides for word in ("--set", override)]


def _calibration(data: CalibrationData | None) -> dict[str, object]:
    """Return the options of calibration: those that say how its data are read where they differ from the defaults."""
    if data is None:
        return {}
    given: dict[str, object] = {"--calibration": data.path.name}
    for item in fields(data):
        value = getattr(data, item.name)
        if item.name.startswith("calibration_") or (item.name != "path" and value != item.default):
            given[flag(item.name)] = value.name if isinstance(value, Path) else value
    return given


def _name(path: Path | None) -> str | None:
    return None if path is None else path.name
