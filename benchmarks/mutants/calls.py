"""Which functions a test calls, in its own process and in those that it starts.

A copy of this file stands as `sitecustomize.py` on the path of a tree under test: every Python that a test starts then
notes its calls, too. It imports the standard library only.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from pathlib import Path
from types import CodeType, FrameType

FILE_OF_CALLS = "N3C_MUTANTS_CALLS"
"""The variable that names the file to which a process appends what it called."""
IMPORTED_FROM = "import/n3c/"
"""Where in a tree under test n3c is imported from: a folder of links to its folders."""


class Calls:
    """The code objects that are entered from `start()` to `stop()`, each once."""

    def __init__(self) -> None:
        self.seen: dict[int, CodeType] = {}

    def start(self) -> None:
        """Note every call of this thread, and of those that begin from now on."""
        threading.setprofile(self._note)
        sys.setprofile(self._note)

    def stop(self) -> None:
        """Note no more."""
        sys.setprofile(None)
        threading.setprofile(None)

    def names(self, root: Path) -> set[str]:
        """Return `path:line` of each function below `root`, and `path::name` of those of generated packages.

        The path of generated code is the file's name alone, as templates are named by it.
        """
        found: set[str] = set()
        for code in self.seen.values():
            path = code.co_filename
            if path.startswith(f"{root}/"):
                inside = path[len(str(root)) + 1 :].removeprefix(IMPORTED_FROM)
                found.add(f"{inside}:{code.co_firstlineno}")
            elif "site-packages" not in path and not path.startswith((sys.base_prefix, "<")):
                found.add(f"{path.rpartition('/')[2]}::{code.co_name}")
        return found

    def _note(self, frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            self.seen[id(frame.f_code)] = frame.f_code


def note_this_process(file: Path, root: Path) -> None:
    """Append to `file`, when the process ends, what it called."""
    calls = Calls()
    calls.start()

    def write() -> None:
        calls.stop()
        with file.open("a", encoding="utf-8") as out:
            out.write("".join(f"{name}\n" for name in calls.names(root)))

    atexit.register(write)


if __name__ == "sitecustomize" and FILE_OF_CALLS in os.environ and "mypy" not in sys.orig_argv:
    note_this_process(Path(os.environ[FILE_OF_CALLS]), Path(__file__).parents[1])
