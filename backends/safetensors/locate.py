"""Where a checkpoint is that a user names: a directory, a repository of the Hugging Face cache, or a hub id.

    CACHE/models--nvidia--NVIDIA-Nemotron-3/refs/main           the commit of a snapshot
    CACHE/models--nvidia--NVIDIA-Nemotron-3/snapshots/COMMIT/   links to blobs

Nothing is downloaded: a hub id is looked up in the cache of this machine by huggingface_hub, where that is installed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from n3c.ir.diagnostics import N3CError

from .checkpoint import file_error

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def checkpoint_directory(name: Path | str) -> Path:
    """Return the directory of the checkpoint `name`; what is none is returned as it is, for its reader to tell.

    N3CError (exit code 6) for a repository of the cache without a snapshot, or with several and no main one, and for a
    hub id that the cache does not have.
    """
    path = Path(name)
    try:
        if (path / "snapshots").is_dir() and not (path / "config.json").exists():
            return _snapshot(path)
        there = path.exists() or path.is_symlink()
    except (OSError, ValueError):  # a name that is too long, or with a null byte
        return path
    if there or _HUB_ID.fullmatch(path.as_posix()) is None or path.suffix in (".json", ".toml", ".safetensors"):
        return path
    return _cached(path)


def require_outside(out: Path, read: Iterable[Path]) -> None:
    """Raise N3CError (E0612, exit code 6) where the folder `out` is one of the folders that are read, or inside one."""
    try:
        around = [folder for folder in read if folder.is_dir() and out.resolve().is_relative_to(folder.resolve())]
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null byte, a loop of links
        raise file_error("E0612", f"the output cannot be written: {error}", out) from error
    if around:
        message = f"the output is inside {around[0]}, which is read and never written to"
        raise file_error("E0612", message, out, "choose another -o")


def _snapshot(repository: Path) -> Path:
    """Return the snapshot of a repository of the cache: that of its main branch, or its only one."""
    snapshots = sorted(path for path in (repository / "snapshots").iterdir() if path.is_dir())
    try:
        main = (repository / "refs/main").read_text(encoding="utf-8")[:64].strip()
    except (OSError, ValueError):
        main = ""
    found = [path for path in snapshots if path.name == main] if _COMMIT.fullmatch(main) else []
    found = found or (snapshots if len(snapshots) == 1 else [])
    if not found:
        message = f"a repository of the Hugging Face cache with {len(snapshots)} snapshots, none of them refs/main"
        help_ = f"name one, as {snapshots[-1]}" if snapshots else "download it again"
        raise file_error("E0601", message, repository, help_)
    return found[0]


def _cached(name: Path) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError:
        return name  # as for any other name that is not there
    try:
        return Path(snapshot_download(name.as_posix(), local_files_only=True))
    except LocalEntryNotFoundError as error:
        message = "no such directory, and not in the Hugging Face cache"
        help_ = f"`hf download {name.as_posix()}` fetches it; HF_HOME says where the cache is"
        raise file_error("E0601", message, name, help_) from error
    except (OSError, ValueError) as error:
        raise _unusable(name, error) from error


def _unusable(name: Path, error: Exception) -> N3CError:
    return file_error("E0601", f"the Hugging Face cache cannot be read: {error}", name, "give the directory")
