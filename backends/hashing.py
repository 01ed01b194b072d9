"""Files by their content: size and SHA-256."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .machine import usable_cores


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_rows(folder: Path, names: Iterable[str]) -> list[dict[str, Any]]:
    """Return path, bytes and sha256 of files below `folder`, by their names there; several are read at once."""
    ordered = list(names)
    with ThreadPoolExecutor(usable_cores()) as pool:
        hashes = pool.map(lambda name: sha256_file(folder / name), ordered)
        return [
            {"path": name, "bytes": (folder / name).stat().st_size, "sha256": digest}
            for name, digest in zip(ordered, hashes, strict=True)
        ]
