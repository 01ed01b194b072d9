"""Locks between processes: never two inside, nothing left, and a dead holder holds nothing."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
from pathlib import Path

import filelock
import pytest

from n3c.backends.locks import HeldError, locked, output_lock

COUNTING = """
import sys
from pathlib import Path
from n3c.backends.locks import locked
folder = Path(sys.argv[1])
for _ in range(40):
    with locked(folder / "lock", lambda: None):
        counter = folder / "counter"
        count = int(counter.read_text())
        counter.write_text(str(count + 1))
"""
DYING = """
import os, signal, sys
from pathlib import Path
from n3c.backends.locks import locked
with locked(Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_never_two_inside(tmp_path: Path) -> None:
    """A lock file that is removed and made again all the time loses no count."""
    (tmp_path / "counter").write_text("0", encoding="utf-8")
    runs = [subprocess.Popen([sys.executable, "-c", COUNTING, tmp_path]) for _ in range(4)]
    assert [process.wait(120) for process in runs] == [0] * 4
    assert (tmp_path / "counter").read_text(encoding="utf-8") == "160"
    assert [path.name for path in tmp_path.iterdir()] == ["counter"]


def test_a_held_lock_is_refused_or_waited_for(tmp_path: Path) -> None:
    path = output_lock(tmp_path / "out")
    assert path.name == ".out.n3c-lock"
    held, asked = threading.Event(), threading.Event()

    def holder() -> None:
        with locked(path):
            held.set()
            asked.wait(30)

    thread = threading.Thread(target=holder)
    thread.start()
    assert held.wait(30)
    with pytest.raises(HeldError), locked(path):
        pass
    with locked(path, asked.set):
        assert asked.is_set()
    thread.join()
    assert not path.exists()


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", DYING, tmp_path / "lock"], check=False, timeout=60)
    assert done.returncode < 0
    assert (tmp_path / "lock").exists()
    with locked(tmp_path / "lock"):
        pass
    assert not (tmp_path / "lock").exists()


def test_a_file_system_without_locks_gets_one_by_existence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(self: filelock.BaseFileLock) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(filelock.UnixFileLock, "_acquire", without)
    with locked(tmp_path / "lock"):
        assert (tmp_path / "lock").exists()
        with pytest.raises(HeldError), locked(tmp_path / "lock"):
            pass
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize("folder", ["file", "missing/below", "/proc"])
def test_where_no_lock_can_be_made_the_system_says_why(folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "missing").symlink_to("/proc/n3c-missing")
    with pytest.raises(OSError), locked(tmp_path / folder / "lock", lambda: None):
        pass
