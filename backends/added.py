"""Backends of installed extensions: targets of `n3c build` beside torch, onnx and trt."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError
from n3c.ir.extensions import entries, guarded, loaded
from n3c.passes.serving import Served
from n3c.specs.schema import Spec

OWN = ("torch", "onnx", "trt")
"""The targets of n3c itself."""
_NAME = re.compile(r"[a-z][a-z0-9_]{0,79}")
Emit = Callable[[Spec, Served], Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Backend:
    """A target of `n3c build`: what it writes, all in the folder of its name in the output."""

    name: str
    summary: str
    """What it writes, in a few words."""
    emit: Emit
    """Returns the files: path below the folder, with `/` → text. They depend on nothing but the arguments."""


@cache
def added_backends() -> dict[str, Backend]:
    """Return the backends of installed extensions, by name; N3CError (E0521, exit code 4) where one is broken."""
    found: dict[str, Backend] = {}
    faults: list[Diagnostic] = []
    for entry in entries("n3c.backends"):
        try:
            backend = loaded(entry, Backend)
        except N3CError as error:
            faults += error.diagnostics
            continue
        if _NAME.fullmatch(backend.name) is None:
            faults.append(entry.fault(f"{backend.name!r} cannot be the name of a target"))
        elif backend.name in OWN or backend.name in found:
            faults.append(entry.fault(f"there is a target `{backend.name}` already"))
        found[backend.name] = Backend(backend.name, backend.summary, guarded(entry, _within(backend.emit)))
    if faults:
        raise N3CError(faults, ExitCode.TARGET)
    return found


def _within(emit: Emit) -> Emit:
    """Return `emit`, held to paths below its folder: ValueError for others."""

    def checked(spec: Spec, served: Served) -> Mapping[str, str]:
        files = emit(spec, served)
        for name in files:
            parts = PurePosixPath(name).parts
            if not parts or name.startswith("/") or "\\" in name or ".." in parts:
                raise ValueError(f"{name!r} is not a path below the folder")
        return files

    return checked
