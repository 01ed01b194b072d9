"""Which functions a test calls, in its own process and in those that it starts.

A copy of this file stands as `sitecustomize.py` on the path of a tree under test: every Python that a test starts then
notes its calls, too. It imports the standard library only.
"""

from __future__ import annotations

import atexit
import cProfile
import os
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from types import CodeType

FILE_OF_CALLS = "N3C_MUTANTS_CALLS"
"""The variable that names the file to which a process appends what it called."""
IMPORTED_FROM = "import/n3c/"
"""Where in a tree under test n3c is imported from: a folder of links to its folders."""


class Calls:
    """The functions that are entered from `start()` to `take()`, in every thread.

    Python's own profiler, which is written in C, notes them: tests take a tenth longer, not three times as long.
    """

    def __init__(self) -> None:
        self._profilers: list[cProfile.Profile] = []

    def start(self) -> None:
        """Note every call of this thread, and of those that begin from now on."""
        threading.setprofile(self._join)
        self._join()

    def take(self) -> set[CodeType]:
        """Return the code of what was called since `start()`, and note no more."""
        threading.setprofile(None)
        profilers, self._profilers = self._profilers, []
        for profiler in profilers:
            profiler.disable()
        entries = (entry for profiler in profilers for entry in profiler.getstats())
        return {entry.code for entry in entries if isinstance(entry.code, CodeType)}

    def _join(self, *_: object) -> None:
        """Have a profiler for this thread: a thread's first call comes to it, the others to the profiler."""
        profiler = cProfile.Profile(subcalls=False, builtins=False)
        self._profilers.append(profiler)
        profiler.enable()


def names_of(codes: Iterable[CodeType], root: Path) -> set[str]:
    """Return `path:qualified name` of each function below `root`, and `path::name` of those of generated packages.

    The path of generated code is the file's name alone, as templates are named by it. Lines move and names stay: what
    was recorded holds for as long as the code is much the same.
    """
    found: set[str] = set()
    for code in codes:
        path = code.co_filename
        if path.startswith(f"{root}/"):
            inside = path[len(str(root)) + 1 :].removeprefix(IMPORTED_FROM)
            found.add(f"{inside}:{code.co_qualname}")
        elif "site-packages" not in path and not path.startswith((sys.base_prefix, "<")):
            found.add(f"{path.rpartition('/')[2]}::{code.co_name}")
    return found


def note_this_process(file: Path, root: Path) -> None:
    """Append to `file`, when the process ends, what it called."""
    calls = Calls()
    calls.start()

    def write() -> None:
        names = names_of(calls.take(), root)
        with file.open("a", encoding="utf-8") as out:
            out.write("".join(f"{name}\n" for name in names))

    atexit.register(write)


if __name__ == "sitecustomize" and FILE_OF_CALLS in os.environ and "mypy" not in sys.orig_argv:
    note_this_process(Path(os.environ[FILE_OF_CALLS]), Path(__file__).parents[1])
