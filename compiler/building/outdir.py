"""Writing OUT: into a sibling that is renamed at the end, so a killed build leaves the old output or none.

While `OUT` is built, `.OUT.n3c-new` beside it holds what is made, under the lock `.OUT.n3c-lock`: builds of
one output wait for each other, and what a killed one left is cleared by the next.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import shutil
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from n3c.backends.hashing import file_rows, sha256_file
from n3c.backends.locks import locked, output_lock
from n3c.backends.trt.plan_file import RUNTIME_CACHE_SUFFIX
from n3c.ir.diagnostics import N3CError
from n3c.runtime.manifest import MANIFEST, out_error, read_manifest
from n3c.specs.files import require_folder_name

_MOST_NAMED = 3
"""Foreign files that a message names."""
_LEFT_BY_USE = ("__pycache__", f"*{RUNTIME_CACHE_SUFFIX}")
"""What running a build leaves in it: nobody's work."""
_BINARY = (".onnx", ".data", ".plan")
"""Suffixes of files that nobody edits: one that differs from what was built is damaged, and is built again."""


def require_writable(out: Path) -> None:
    """Raise N3CError before any work where `out` cannot be written, or holds what n3c did not build."""
    require_folder_name(out)
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


def _require_ours(out: Path, folder: Path | None = None) -> None:
    """Raise N3CError where replacing `out` would lose a file, or an edit, that no build of n3c made.

    `folder` is where the files of `out` are, where they have been moved.
    """
    folder = folder or out
    if folder.exists() and not folder.is_dir():
        raise out_error("E0610", "the output is a file, not a directory", out)
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    manifest = read_manifest(folder)
    if manifest is None:
        message = f"the output holds files but no {MANIFEST} of n3c; it is left as it is"
        raise out_error("E0611", message, out, "choose another -o")
    built = {file["path"]: file for file in manifest["files"]}
    found = [name for name in _files(folder) if name != MANIFEST and not _is_left_by_use(name)]
    foreign = [name for name in found if name not in built]
    edited = [name for name in found if name in built and _is_edited(folder / name, built[name])]
    for names, what in ((foreign, "that n3c did not write"), (edited, "that were edited since they were built")):
        if names:
            more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
            message = f"the output holds files {what}: {', '.join(names[:_MOST_NAMED])}{more}; it is left as it is"
            raise out_error("E0611", message, out, "move them elsewhere or delete them, or choose another -o")


def _is_left_by_use(name: str) -> bool:
    return any(fnmatch.fnmatch(part, pattern) for part in name.split("/") for pattern in _LEFT_BY_USE)


def _is_edited(path: Path, built: dict[str, Any]) -> bool:
    """Whether a file is no longer what its line of the manifest says, by somebody's hand."""
    return path.is_symlink() or (path.suffix not in _BINARY and sha256_file(path) != built.get("sha256"))


def _files(directory: Path) -> list[str]:
    """Return every file and every link below `directory`, sorted."""
    found = (path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(directory).as_posix() for path in found)


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
    """Make `.OUT.n3c-new` under the output's lock, empty, and remove it in the end if it is still there."""
    folder = real.with_name(f".{real.name}.n3c-new")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(output_lock(real), lambda: waiting(f"waiting for another process at {out}")))
            _restore(real)
            _clear(folder)
            folder.mkdir()
        except OSError as error:
            raise _unwritable(out, error) from error
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


def _clear(path: Path) -> None:
    """Remove what a killed build left; of a link only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _old(real: Path) -> Path:
    return real.with_name(f".{real.name}.n3c-old")


def _restore(real: Path) -> None:
    """Put back the output that a build which was killed or refused between its two renames had moved away."""
    old = _old(real)
    if old.exists() and not real.exists():
        old.rename(real)
    shutil.rmtree(old, ignore_errors=True)


def _swap(folder: Path, real: Path) -> None:
    if not real.exists():
        folder.rename(real)
        return
    try:
        real.rename(_old(real))
        # Again: a build takes a minute, in which somebody may have put a file there. Now nobody can any more.
        _require_ours(real, _old(real))
        folder.rename(real)
    finally:
        _restore(real)


def _remove_empty(folder: Path, kept: Path) -> None:
    """Remove the directories from `folder` up to below `kept` that are empty."""
    with contextlib.suppress(OSError):
        while folder != kept:
            folder.rmdir()
            folder = folder.parent


def keep_other_targets(out: Path, temporary: Path, spec_sha256: str, replaced: Sequence[str]) -> dict[str, Any]:
    """Link what an earlier build of the same spec made for other targets into the new output.

    Returns by which options they were built.
    """
    manifest = read_manifest(out)
    if manifest is None or manifest["spec"].get("sha256") != spec_sha256:
        return {}
    for folder in sorted(p for p in out.iterdir() if p.is_dir() and p.name not in replaced):
        shutil.copytree(
            folder, temporary / folder.name, copy_function=_link, ignore=shutil.ignore_patterns(*_LEFT_BY_USE)
        )
    return {target: options for target, options in manifest.get("builds", {}).items() if target not in replaced}


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def described_files(directory: Path) -> list[dict[str, Any]]:
    """Return path, bytes and sha256 of every file below `directory`, sorted by path."""
    paths = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return file_rows(directory, (path.relative_to(directory).as_posix() for path in paths))
