"""The user's cache folder: for what n3c can make again, and takes from there where an earlier run made it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

FOLDER = "N3C_CACHE_DIR"
"""The variable of the environment that names another folder."""


def cache_folder() -> Path:
    """Return the folder, which need not exist: `N3C_CACHE_DIR`, or `n3c` where the system keeps a user's caches.

    OSError where the user has no home.
    """
    if named := os.environ.get(FOLDER):
        return Path(named)
    try:
        return _of_the_user() / "n3c"
    except RuntimeError as error:  # of `Path.home`
        raise OSError(str(error)) from error


def _of_the_user() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    named = os.environ.get("XDG_CACHE_HOME", "")
    return Path(named) if named.startswith("/") else Path.home() / ".cache"  # a relative one is to be ignored
