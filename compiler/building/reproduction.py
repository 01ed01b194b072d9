"""`repro`: build again what a build was made of, and compare every file."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from n3c.backends.progress import SILENT, Progress
from n3c.backends.trt.plan_comparison import same_but_for_order
from n3c.backends.trt.plan_file import SIDECAR_SUFFIX, read_sidecar
from n3c.ir.diagnostics import Diagnostic, Severity, Span
from n3c.runtime.build_folder import OpenedBuild, open_build
from n3c.runtime.manifest import MANIFEST, out_error, read_manifest
from n3c.runtime.options import Argument, Option, checked, usage_error

from .driver import build as build_again
from .recorded import Recorded, recorded

Verdict = Literal["equal", "reordered", "different", "missing", "unexpected"]
"""`reordered`: a plan that differs by the order of its records alone, and its sidecar; `missing`: not built again."""

PLAN = ".plan"
MEASURED = "seconds"
"""The key of the manifest's passes that tells how long each took."""


@dataclass(frozen=True, slots=True)
class ComparedFile:
    """A file of the build beside the one that was built again."""

    path: str
    verdict: Verdict
    detail: str = ""

    @property
    def ok(self) -> bool:
        """Whether the build gives this file again, as far as its writer does."""
        return self.verdict in ("equal", "reordered")


@dataclass(frozen=True, slots=True)
class Reproduced:
    """How a build compares with the same one made again."""

    build: Path
    files: tuple[ComparedFile, ...]
    diagnostics: tuple[Diagnostic, ...]
    """An error for each file that differs; a warning where other versions of tools built it."""

    @property
    def ok(self) -> bool:
        """Whether every file is the same, plans up to the order of their records."""
        return all(file.ok for file in self.files)

    def as_json(self) -> dict[str, Any]:
        """Return the form of `n3c repro --json`."""
        return {
            "ok": self.ok,
            "build": str(self.build),
            "files": [{"path": file.path, "verdict": file.verdict, "detail": file.detail} for file in self.files],
            "diagnostics": [diagnostic.as_json() for diagnostic in self.diagnostics],
        }


@checked
def repro(
    build: Annotated[Path | str, Argument("BUILD")],
    weights: Annotated[
        Path | str | None, Option("Checkpoint directory, for a build that holds its weights.", metavar="DIR")
    ] = None,
    *,
    progress: Progress = SILENT,
) -> Reproduced:
    """Build again, in a temporary folder, by the spec and the options that a build recorded; compare every file.

    What differs is in the result. N3CError: exit code 2 where the build holds weights and none are named, or the
    other way round; 4 where a target cannot be built on this machine; 6 where a file is not what was built.
    """
    progress.phase("open")
    out = Path(build)
    opened = open_build(out)
    requests = recorded(opened.manifest)
    if requests is None:
        help_ = "build it again: builds of older versions of n3c have no record"
        raise out_error("E0831", f"{MANIFEST} does not tell by which options it was built", out / MANIFEST, help_)
    _require_weights(requests, weights)
    with tempfile.TemporaryDirectory(prefix="n3c-repro-") as folder:
        again = Path(folder) / "out"
        for request in requests:
            build_again(out / "spec.toml", output=again, progress=progress, **request.arguments(weights))
        progress.phase("compare")
        files = _compared(opened, again)
        tools = _other_tools(opened.manifest, read_manifest(again) or {})
    return Reproduced(out, files, tuple(_diagnostics(out, files, tools)))


def _require_weights(requests: Sequence[Recorded], weights: object) -> None:
    embedded = any(request.weights_mode == "embedded" for request in requests)
    if embedded and weights is None:
        raise usage_error("the build holds its weights: name their checkpoint by --weights DIR")
    if weights is not None and not embedded:
        raise usage_error("--weights has no effect: the build holds no weights")


def _compared(opened: OpenedBuild, again: Path) -> tuple[ComparedFile, ...]:
    new = read_manifest(again)
    assert new is not None, "the build that has just been made has a manifest"
    ours, theirs = ({file["path"]: file["sha256"] for file in made["files"]} for made in (opened.manifest, new))
    found: list[ComparedFile] = []
    for path in sorted(ours.keys() | theirs.keys()):
        if path not in theirs:
            found.append(ComparedFile(path, "missing", "the rebuild does not have it"))
        elif path not in ours:
            found.append(ComparedFile(path, "unexpected", "only the rebuild has it"))
        elif ours[path] == theirs[path]:
            found.append(ComparedFile(path, "equal"))
        else:
            found.append(_different(opened.out, again, path))
    return (*found, _compared_manifests(opened.manifest, new))


def _different(out: Path, again: Path, path: str) -> ComparedFile:
    """Compare two files of other bytes: a plan may differ in the order of its records, and its sidecar in its hash."""
    ours, theirs = out / path, again / path
    if path.endswith(PLAN) and same_but_for_order(ours, theirs):
        return ComparedFile(path, "reordered", "the same records in another order")
    if path.endswith(PLAN + SIDECAR_SUFFIX):
        plan = path.removesuffix(SIDECAR_SUFFIX)
        keys = _differing(*(read_sidecar(folder / plan).as_json() for folder in (out, again)))
        if keys == ["sha256"] and same_but_for_order(out / plan, again / plan):
            return ComparedFile(path, "reordered", "the hash of a plan in another order")
        return ComparedFile(path, "different", f"in {', '.join(keys) or 'what n3c does not write'}")
    return ComparedFile(path, "different", _first_difference(ours, theirs))


def _first_difference(ours: Path, theirs: Path) -> str:
    sizes = ours.stat().st_size, theirs.stat().st_size
    if sizes[0] != sizes[1]:
        return f"{sizes[0]:,} bytes, again {sizes[1]:,}"
    with ours.open("rb") as a, theirs.open("rb") as b:
        start = 0
        while (piece := a.read(1 << 20)) == (other := b.read(1 << 20)):
            start += len(piece)
    start += next(i for i, (byte, another) in enumerate(zip(piece, other, strict=True)) if byte != another)
    return f"from byte {start:,} on"


def _compared_manifests(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> ComparedFile:
    """Compare what two manifests say, but for what is measured, tools, and files, which are compared one by one."""
    keys = _differing(*(_lasting(manifest) for manifest in (ours, theirs)))
    return ComparedFile(MANIFEST, "different", f"in {', '.join(keys)}") if keys else ComparedFile(MANIFEST, "equal")


def _lasting(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return what two builds of the same input have in common, whenever and wherever they are made."""
    passes = [{key: value for key, value in row.items() if key != MEASURED} for row in manifest["passes"]]
    kept = {key: value for key, value in manifest.items() if key not in ("tools", "files")}
    return kept | {"passes": passes}


def _differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    return sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))


def _other_tools(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Return the tools whose versions differ: `onnx 1.20.0, now 1.21.0`."""
    then, now = ours["tools"], theirs["tools"]
    return [f"{name} {then.get(name, 'none')}, now {now.get(name, 'none')}" for name in _differing(then, now)]


def _diagnostics(out: Path, files: Sequence[ComparedFile], tools: Sequence[str]) -> list[Diagnostic]:
    found: list[Diagnostic] = []
    if tools:
        message = f"other versions built it: {'; '.join(tools)}"
        found.append(Diagnostic("W0832", message, Span(str(out / MANIFEST)), severity=Severity.WARNING))
    help_ = "install the versions that built it (W0832)" if tools else None
    for file in files:
        if not file.ok:
            message = f"`{file.path}` is not built the same again: {file.detail}"
            found.append(Diagnostic("E0830", message, Span(str(out / file.path)), help=help_))
    return found
