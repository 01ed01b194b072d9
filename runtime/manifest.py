"""manifest.json of a build, read back: its files, their hashes, and whether they are still what was built."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeGuard, cast

from n3c.backends.hashing import sha256_file
from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Span
from n3c.ir.json_file import is_count, read_json

MANIFEST = "manifest.json"


def out_error(code: str, message: str, path: Path, help: str | None = None) -> N3CError:
    """Return an error about the output (exit code 6)."""
    return N3CError(Diagnostic(code, message, Span(str(path)), help=help), ExitCode.FILE)


def read_manifest(out: Path) -> dict[str, Any] | None:
    """Return the manifest of a build, or None without one that n3c wrote."""
    try:
        data = read_json(out / MANIFEST)
    except (OSError, ValueError):
        return None
    return data if _is_manifest(data) else None


def _is_manifest(data: object) -> TypeGuard[dict[str, Any]]:
    """Whether `data` has what n3c reads back of a manifest."""
    return (
        _has(data, {"spec": dict, "files": list, "ledger": list, "parameters": dict})
        and isinstance(data.get("builds", {}), dict)
        and _has(data["spec"], {"name": str, "sha256": str})
        and all(is_count(data["parameters"].get(key)) for key in ("total", "mtp"))
        and all(_is_file(file) for file in data["files"])
        and all(_has(entry, {"format": str}) and is_count(entry.get("bytes")) for entry in data["ledger"])
    )


def _is_file(row: object) -> bool:
    return (
        _has(row, {"path": str, "sha256": str})
        and is_count(row.get("bytes"))
        and re.fullmatch(r"[0-9a-f]{64}", row["sha256"]) is not None
    )


def _has(data: object, keys: dict[str, type]) -> TypeGuard[dict[str, Any]]:
    if not isinstance(data, dict):
        return False
    table = cast("dict[str, object]", data)
    return all(isinstance(table.get(key), kind) for key, kind in keys.items())


def verify_files(out: Path, manifest: dict[str, Any]) -> list[Diagnostic]:
    """Return an E0640 for each file of `manifest` that is missing from `out`, cut or altered.

    Reads every file; sizes are compared first. Nothing outside of `out` is read, whatever the manifest says.
    """
    faults: list[Diagnostic] = []
    for file in manifest["files"]:
        path = out / file["path"]
        try:
            if not path.resolve().is_relative_to(out.resolve()) or not path.is_file():
                reason = "no such file in the output"
            elif path.stat().st_size != file["bytes"]:
                reason = f"{path.stat().st_size} bytes instead of {file['bytes']}"
            elif sha256_file(path) != file.get("sha256"):
                reason = "another SHA-256"
            else:
                continue
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error)
        message = f"`{file['path']}` is not what was built: {reason}"
        faults.append(Diagnostic("E0640", message, Span(str(path)), help="build it again"))
    return faults
