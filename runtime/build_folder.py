"""A build, opened to be run or verified: its files are what the manifest says, and its spec is compiled again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Span
from n3c.passes.serving import Served, serve
from n3c.runtime.manifest import MANIFEST, out_error, read_manifest, verify_files
from n3c.specs.dump import dump_spec
from n3c.specs.load import load_spec
from n3c.specs.schema import Spec

_REBUILD = "build it again (`n3c build`), into the same or another directory"


@dataclass(frozen=True, slots=True)
class OpenedBuild:
    """A build that was opened: its files are complete and unaltered."""

    out: Path
    spec: Spec
    served: Served
    manifest: dict[str, Any]

    @property
    def sms(self) -> tuple[int, ...]:
        """The SM versions that its plans are for, as its manifest records; none of a build without plans."""
        plans = cast("dict[str, Any]", self.manifest.get("builds", {})).get("trt")
        given: object = cast("dict[str, Any]", plans).get("sm") if isinstance(plans, dict) else None
        return tuple(sm for sm in cast("list[object]", given) if isinstance(sm, int)) if isinstance(given, list) else ()

    def has(self, file: str) -> bool:
        """Whether the build has `file`, a path below it."""
        return any(entry["path"] == file for entry in self.manifest["files"])


def open_build(out: Path) -> OpenedBuild:
    """Read a build. N3CError (exit code 6) where it is not one, or a file is missing, truncated or altered."""
    if not out.is_dir():
        raise out_error("E0601", "not a directory", out)
    manifest = read_manifest(out)
    if manifest is None:
        raise out_error("E0614", f"no {MANIFEST} of n3c: it is missing or damaged", out / MANIFEST, _REBUILD)
    faults = verify_files(out, manifest)
    if faults:
        raise N3CError(faults, ExitCode.FILE)
    spec, _ = load_spec(out / "spec.toml")
    if hashlib.sha256(dump_spec(spec).encode()).hexdigest() != manifest["spec"]["sha256"]:
        raise _altered(out / MANIFEST, "the manifest has the hash of another spec than spec.toml is")
    served = serve(spec)
    if _plain(manifest.get("state_plan")) != _plain(served.plan.as_json()):
        raise _altered(out / MANIFEST, "the manifest's state plan is not that of the spec, or of another n3c version")
    return OpenedBuild(out, spec, served, manifest)


def _plain(data: object) -> object:
    """Return `data` as it is after writing and reading JSON."""
    return json.loads(json.dumps(data))


def _altered(path: Path, message: str) -> N3CError:
    return N3CError(Diagnostic("E0807", message, Span(str(path)), help=_REBUILD), ExitCode.FILE)
