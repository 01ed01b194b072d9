"""Copies of the checkout's files that a test can change, whatever the rights in the checkout are."""

from __future__ import annotations

import shutil
from pathlib import Path


def writable_copy(source: Path, target: Path, *ignored: str) -> None:
    """Copy a folder, but for what has the names `ignored`; links stay links, and all of the copy can be written."""
    ignore = shutil.ignore_patterns("__pycache__", *ignored)
    shutil.copytree(source, target, symlinks=True, ignore=ignore, copy_function=shutil.copyfile)
    for folder in (target, *(path for path in target.rglob("*") if path.is_dir() and not path.is_symlink())):
        folder.chmod(0o755)
