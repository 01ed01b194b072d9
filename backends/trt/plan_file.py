"""The sidecar of a plan: what it was built by and for, so that a plan that cannot run is refused before it is loaded.

TensorRT's own check (`Runtime.get_engine_validity`) needs a GPU, and what it says of a plan for another
version or GPU is an error code; a plan that was cut or altered may be worse than refused. So `<plan>.json`
beside each plan tells flavour and version of TensorRT, the SMs, size and SHA-256, the hash of the spec.
Standard library only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Span
from n3c.ir.json_file import is_count, read_json

from .targets import TARGETS, Flavour, named

SIDECAR_SUFFIX = ".json"
RUNTIME_CACHE_SUFFIX = ".runtime-cache"
"""Of the kernels that TensorRT-RTX compiled when plans ran, kept beside them by who runs a build."""
_MODULES = {"rtx": "tensorrt_rtx", "full": "tensorrt"}


@dataclass(frozen=True, slots=True)
class Sidecar:
    """The content of `<plan>.json`."""

    entry: str
    """`decode.b4`: the entry point and the batch size."""
    stage: int | None
    flavour: Flavour
    version: str
    """Of TensorRT; plans run with exactly this one."""
    sms: tuple[int, ...]
    bytes: int
    sha256: str
    spec_sha256: str
    weights_mode: str

    def as_json(self) -> dict[str, Any]:
        """Return the form of the file."""
        return {
            "schema": 1,
            "entry": self.entry,
            "stage": self.stage,
            "tensorrt": {"flavour": self.flavour, "module": _MODULES[self.flavour], "version": self.version},
            "sms": list(self.sms),
            "bytes": self.bytes,
            "sha256": self.sha256,
            "spec_sha256": self.spec_sha256,
            "weights_mode": self.weights_mode,
        }


def sidecar_path(plan: Path) -> Path:
    """Return where the sidecar of `plan` is."""
    return plan.with_name(plan.name + SIDECAR_SUFFIX)


def write_sidecar(plan: Path, sidecar: Sidecar) -> None:
    """Write the sidecar beside `plan`."""
    sidecar_path(plan).write_text(json.dumps(sidecar.as_json(), indent=1) + "\n", encoding="utf-8", newline="\n")


def read_sidecar(plan: Path) -> Sidecar:
    """Return the sidecar of `plan`; N3CError (E0641, exit code 6) where it is missing or not understood."""
    path = sidecar_path(plan)
    try:
        return _parsed(cast("Any", read_json(path)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not one that `n3c build` wrote"
        diagnostic = Diagnostic("E0641", f"the sidecar of a plan cannot be read: {reason}", Span(str(path)))
        raise N3CError(diagnostic, ExitCode.FILE) from error


def _parsed(data: Mapping[str, Any]) -> Sidecar:
    """Raises KeyError, TypeError or ValueError where `data` is not what `as_json` gives."""
    trt, stage, sms, size = data["tensorrt"], data["stage"], data["sms"], data["bytes"]
    if data["schema"] != 1 or trt["flavour"] not in _MODULES:
        raise ValueError("another schema")
    texts = (data["entry"], trt["version"], data["sha256"], data["spec_sha256"], data["weights_mode"])
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("not a text")
    if not isinstance(sms, list) or not all(is_count(number) for number in (*cast("list[object]", sms), size)):
        raise TypeError("not a number")
    if stage is not None and not is_count(stage):
        raise TypeError("not a stage")
    return Sidecar(
        entry=data["entry"],
        stage=stage,
        flavour=trt["flavour"],
        version=trt["version"],
        sms=tuple(cast("list[int]", sms)),
        bytes=size,
        sha256=data["sha256"],
        spec_sha256=data["spec_sha256"],
        weights_mode=data["weights_mode"],
    )


def check_plan(
    plan: Path,
    sidecar: Sidecar | None = None,
    *,
    sm: int,
    version: str,
    flavour: Flavour = "rtx",
    spec_sha256: str | None = None,
) -> Sidecar:
    """Return the sidecar of `plan` if it runs on a GPU of `sm` with TensorRT `version`; reads no more than the file.

    Raises N3CError, before anything is loaded: E0511 for another TensorRT and E0512 for another GPU (exit
    code 4), both with the command that rebuilds the plan; E0640 for a plan that was cut, altered or made
    for another spec, E0641 for its sidecar (exit code 6).
    """
    sidecar = sidecar or read_sidecar(plan)
    span = Span(str(plan))
    wrong: Diagnostic | None = None
    if (flavour, version) != (sidecar.flavour, sidecar.version):
        built, installed = (f"{_MODULES[f]} {v}" for f, v in ((sidecar.flavour, sidecar.version), (flavour, version)))
        wrong = Diagnostic("E0511", f"the plan was built by {built}, here is {installed}", span)
    elif sm not in sidecar.sms:
        title = f" ({TARGETS[sm].title})" if sm in TARGETS else ""
        wrong = Diagnostic("E0512", f"the plan is for SM {named(sidecar.sms)}, this GPU is SM {sm}{title}", span)
    if wrong is not None:
        command = rebuild_command(plan, sidecar, sm=sm, flavour=flavour)
        raise N3CError(Diagnostic(wrong.code, wrong.message, span, help=f"rebuild it: {command}"), ExitCode.TARGET)
    fault = _altered(plan, sidecar)
    if fault is None and spec_sha256 not in (None, sidecar.spec_sha256):
        fault = "it was built from another spec"
    if fault is not None:
        command = rebuild_command(plan, sidecar, sm=sm, flavour=flavour)
        diagnostic = Diagnostic(
            "E0640", f"the plan is not what was built: {fault}", span, help=f"rebuild it: {command}"
        )
        raise N3CError(diagnostic, ExitCode.FILE)
    return sidecar


def rebuild_command(plan: Path, sidecar: Sidecar, *, sm: int, flavour: Flavour) -> str:
    """Return the command that builds `plan` for `sm`, and for what it is for already, into the same output."""
    out = plan.parent.parent
    sms = tuple(dict.fromkeys((*sidecar.sms, sm))) if flavour == sidecar.flavour == "rtx" else (sm,)
    mode = "" if sidecar.weights_mode == "bound" else f" --weights-mode {sidecar.weights_mode} --weights DIR"
    return f"n3c build {out / 'spec.toml'} --target trt --trt {flavour} --sm {named(sms)}{mode} -o {out}"


def _altered(plan: Path, sidecar: Sidecar) -> str | None:
    try:
        size = plan.stat().st_size
        if size != sidecar.bytes:
            return f"{size} bytes instead of {sidecar.bytes}"
        with plan.open("rb") as file:
            return None if hashlib.file_digest(file, "sha256").hexdigest() == sidecar.sha256 else "another SHA-256"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
