"""Writing OUT: into a sibling that is renamed at the end, so a killed build leaves the old output or none.

While `OUT` is built, `.OUT.n3c-new` beside it holds what is made, under a lock that ends with its
process: builds of one output wait for each other, and what a killed one left is cleared by the next.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeGuard, cast

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Span

MANIFEST = "manifest.json"
_MOST_NAMED = 3
"""Foreign files that a message names."""


def out_error(code: str, message: str, path: Path, help: str | None = None) -> N3CError:
    """Return an error about the output (exit code 6)."""
    return N3CError(Diagnostic(code, message, Span(str(path)), help=help), ExitCode.FILE)


def require_writable(out: Path) -> None:
    """Raise N3CError before any work where `out` cannot be written, or holds what n3c did not build."""
    try:
        _require_ours(out)
        if out.is_dir() and os.path.ismount(out):
            raise out_error("E0612", "the output is a mount point", out, "choose a folder inside it")
        parent = _existing(out.resolve().parent)
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise out_error("E0612", "the output cannot be written here", out)
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null byte, a loop of links
        raise _unwritable(out, error) from error


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def _unwritable(out: Path, error: Exception) -> N3CError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return out_error("E0612", f"the output cannot be written: {reason}", out)


def _require_ours(out: Path) -> None:
    """Raise N3CError where replacing `out` would lose a file that no build of n3c wrote."""
    if out.exists() and not out.is_dir():
        raise out_error("E0610", "the output is a file, not a directory", out)
    if not out.is_dir() or not any(out.iterdir()):
        return
    manifest = read_manifest(out)
    if manifest is None:
        message = f"the output holds files but no {MANIFEST} of n3c; it is left as it is"
        raise out_error("E0611", message, out, "choose another -o")
    written = {MANIFEST, *(file["path"] for file in manifest["files"])}
    foreign = [name for name in _files(out) if name not in written and "__pycache__" not in name.split("/")]
    if foreign:
        more = f" and {len(foreign) - _MOST_NAMED} more" if len(foreign) > _MOST_NAMED else ""
        named = ", ".join(foreign[:_MOST_NAMED])
        raise out_error(
            "E0611",
            f"the output holds files that n3c did not write: {named}{more}; it is left as it is",
            out,
            "move them elsewhere, or choose another -o",
        )


def _files(directory: Path) -> list[str]:
    """Return every file and every link below `directory`, sorted."""
    found = (path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(directory).as_posix() for path in found)


def read_manifest(out: Path) -> dict[str, Any] | None:
    """Return the manifest of a build, or None where there is none that n3c wrote."""
    try:
        data: object = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return data if _is_manifest(data) else None


def _is_manifest(data: object) -> TypeGuard[dict[str, Any]]:
    """Whether `data` has what n3c reads back of a manifest."""
    return (
        _has(data, {"spec": dict, "files": list, "ledger": list})
        and _has(data["spec"], {"name": str, "sha256": str})
        and all(_has(file, {"path": str, "bytes": int}) for file in data["files"])
        and all(_has(entry, {"format": str, "bytes": int}) for entry in data["ledger"])
    )


def _has(data: object, keys: dict[str, type]) -> TypeGuard[dict[str, Any]]:
    if not isinstance(data, dict):
        return False
    table = cast("dict[str, object]", data)
    return all(isinstance(table.get(key), kind) for key, kind in keys.items())


@contextlib.contextmanager
def replacing(out: Path, waiting: Callable[[str], None]) -> Generator[Path]:
    """Yield an empty directory beside `out`; rename it to `out` at the end, or remove it on any error.

    Where another build of `out` runs, `waiting` is told so and this one begins when that has ended.
    """
    try:
        real = out.resolve()
        kept = _existing(real.parent)
        real.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise _unwritable(out, error) from error
    try:
        with _claimed(real, out, waiting) as folder:
            yield folder
            _swap(folder, real)
    except OSError as error:
        raise out_error("E0613", f"writing the output failed: {error.strerror or error}", out) from error
    finally:
        _remove_empty(real.parent, kept)


@contextlib.contextmanager
def _claimed(real: Path, out: Path, waiting: Callable[[str], None]) -> Generator[Path]:
    """Make `.OUT.n3c-new` under a lock, empty, and remove it in the end if it is still there."""
    folder, lock = real.with_name(f".{real.name}.n3c-new"), -1
    try:
        while lock < 0:
            folder.mkdir(exist_ok=True)
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                _lock(lock, lambda: waiting(f"waiting for another build of {out}"))
                gone = not folder.exists() or not os.path.samestat(os.fstat(lock), folder.stat())
            except BaseException:
                os.close(lock)
                raise
            if gone:  # the other build renamed or removed it: what is locked is no longer the claim
                os.close(lock)
                lock = -1
        _restore(real)
        _clear(folder)
    except OSError as error:
        raise _unwritable(out, error) from error
    try:
        yield folder
    finally:
        if folder.exists() and os.path.samestat(os.fstat(lock), folder.stat()):
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _lock(descriptor: int, waiting: Callable[[], None]) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        waiting()
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:  # some network file systems have no locks: then builds of one output must not run at once
        return


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _old(real: Path) -> Path:
    return real.with_name(f".{real.name}.n3c-old")


def _restore(real: Path) -> None:
    """Put back the output that a build which was killed between its two renames had moved away."""
    old = _old(real)
    if old.is_dir() and not real.exists():
        old.rename(real)
    shutil.rmtree(old, ignore_errors=True)


def _swap(folder: Path, real: Path) -> None:
    _require_ours(real)  # again: a build takes a minute, in which somebody may have put a file there
    if not real.exists():
        folder.rename(real)
        return
    try:
        real.rename(_old(real))
        folder.rename(real)
    finally:
        _restore(real)


def _remove_empty(folder: Path, kept: Path) -> None:
    """Remove the directories from `folder` up to below `kept` that are empty."""
    with contextlib.suppress(OSError):
        while folder != kept:
            folder.rmdir()
            folder = folder.parent


def keep_other_targets(out: Path, temporary: Path, spec_sha256: str, replaced: set[str]) -> None:
    """Link what an earlier build of the same spec made for other targets into the new output."""
    manifest = read_manifest(out)
    if manifest is None or manifest["spec"].get("sha256") != spec_sha256:
        return
    for folder in sorted(p for p in out.iterdir() if p.is_dir() and p.name not in replaced):
        shutil.copytree(
            folder, temporary / folder.name, copy_function=_link, ignore=shutil.ignore_patterns("__pycache__")
        )


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


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


def described_files(directory: Path) -> list[dict[str, Any]]:
    """Return path, bytes and sha256 of every file below `directory`, sorted by path."""
    return [
        {"path": path.relative_to(directory).as_posix(), "bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    ]


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
