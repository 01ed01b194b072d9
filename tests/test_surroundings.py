"""The tests pass wherever they run: tests of every sort run in a checkout that is as unkind as one can be.

Its path has spaces, nothing in it can be written, neither can the home and the caches; new files are for their owner
alone (umask 077); interrupts are ignored, as in a shell's background and under nohup; and the order is another one.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = (
    "tests/ir/test_json_file.py",  # nothing but Python
    "tests/specs/test_rules.py",
    "tests/backends/test_locks.py",  # processes and files
    "tests/compiler/cli/test_bad_input.py::test_a_folder_without_permission",
    "tests/compiler/cli/test_progress.py::test_an_interrupt_restores_the_terminal",  # signals
    "tests/backends/safetensors/test_packing.py::test_half_precision_is_packed_as_its_float32",  # numba's cache
)
DROP_CAPABILITY, DAC_OVERRIDE, DAC_READ_SEARCH = 24, 1, 2  # prctl and capabilities of Linux


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Path]:
    """A copy of what the tests need, which nobody can write."""
    folder = tmp_path / "a folder with spaces"
    unused = shutil.ignore_patterns(".*", "build", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, folder, ignore=unused, symlinks=True)
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink())]
    for path in folders:
        path.chmod(0o555)
    yield folder
    for path in folders:
        path.chmod(0o755)


def unkind() -> None:
    """What a shell does for a program in its background, and nohup; and root may write no more than others."""
    if os.geteuid() == 0 and sys.platform == "linux":
        for capability in (DAC_OVERRIDE, DAC_READ_SEARCH):
            assert ctypes.CDLL(None).prctl(DROP_CAPABILITY, capability, 0, 0, 0) == 0
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.umask(0o077)


@pytest.mark.skipif(sys.platform == "win32", reason="signals and permissions of POSIX")
def test_unkind_surroundings(checkout: Path, tmp_path: Path) -> None:
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    home.mkdir(mode=0o555)
    temporary.mkdir()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "support.shuffled", "-W", "ignore", *TESTS]
    environment = os.environ | {
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home),
        "TMPDIR": str(temporary),
        "PYTHONPATH": os.pathsep.join(str(checkout / name) for name in ("typings", "tests")),
        "N3C_TEST_SEED": "3",
    }
    environment.pop("NUMBA_CACHE_DIR", None)
    touched = subprocess.run(["touch", checkout / "file"], preexec_fn=unkind, capture_output=True, check=False)
    assert touched.returncode != 0, "the checkout can be written, and the rest shows nothing"
    done = subprocess.run(
        command, cwd=checkout, env=environment, preexec_fn=unkind, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert not any(home.iterdir())
