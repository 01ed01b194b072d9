"""Two builds compared: files, tool versions, and what the audits of their plans say."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from n3c.ir.json_file import read_json

from .spec_difference import Change
from .subject import Subject

AUDIT = "trt/audit.json"


def read_audit(out: Path) -> dict[str, Any] | None:
    """Return the audit of a build's plans; None where it has none, or none that is readable."""
    try:
        data = read_json(out / AUDIT)
    except (OSError, ValueError):
        return None
    return cast("dict[str, Any]", data) if isinstance(data, dict) else None


def compare_builds(a: Subject, b: Subject) -> tuple[Change, ...]:
    """Return what differs of two builds: options, realised precisions, bytes moved, tools, files.

    Of a target that only one of them has, the options are told and not every file.
    """
    manifests = [subject.manifest or {} for subject in (a, b)]
    audits = [read_audit(subject.place) or {} if subject.place else {} for subject in (a, b)]
    folders = [{_folder(file["path"]) for file in manifest.get("files", ())} for manifest in manifests]
    shared = folders[0] & folders[1]
    facts = [
        dict((*_options(manifest), *_audit_facts(audit), *_files(manifest, shared)))
        for manifest, audit in zip(manifests, audits, strict=True)
    ]
    keys = dict.fromkeys((*facts[0], *facts[1]))
    changes = (Change(key, facts[0].get(key), facts[1].get(key)) for key in keys)
    return tuple(change for change in changes if change.a != change.b)


def _options(manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for target, options in manifest.get("builds", {}).items():
        yield f"builds.{target}", ", ".join(f"{name} {value}" for name, value in options.items()) or "built"
    for tool, version in manifest.get("tools", {}).items():
        yield f"tools.{tool}", str(version)


def _files(manifest: Mapping[str, Any], folders: Collection[str]) -> Iterator[tuple[str, str]]:
    for file in manifest.get("files", ()):
        if _folder(file["path"]) in folders:
            yield file["path"], f"{file['bytes']:,} bytes, sha256 {file['sha256'][:12]}"


def _folder(path: str) -> str:
    return path.rpartition("/")[0].partition("/")[0]


def _audit_facts(audit: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for row in audit.get("linears", ()):
        yield f"{row['plan']}: {row['name']}", f"{row['requested']} realised as {row['realised']}"
    for plan, kernels in audit.get("plans", {}).items():
        yield f"{plan}: kernels", f"{kernels['kernels']}, {kernels['scratch_bytes']:,} bytes of scratch"
    for entry, moved in audit.get("traffic", {}).get("entries", {}).items():
        yield f"{entry}: moves", f"{moved['bytes']:,} bytes, {moved['ratio']}x of what it must"
    for entry, gpus in audit.get("time", {}).items():
        for gpu, time in gpus.items():
            yield f"{entry} on {gpu}", f"{time['predicted_us']} µs, bound by {time['bound_by']}"
