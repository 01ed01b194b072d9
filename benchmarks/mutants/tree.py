"""A copy of the tree whose tests run in forks of this process.

What the tests import from other projects is imported once, before the forks: a test of a tenth of a second takes a
tenth of a second. n3c itself is imported by each fork, from the copy.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Generator, Sequence
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from . import calls

ROOT = Path(__file__).parents[2]
_SHARED = (
    "numpy", "hypothesis", "jinja2", "click", "rich", "onnx", "onnx_ir", "numba", "torch", "safetensors.torch",
    "transformers", "transformers.modeling_utils", "transformers.generation", "jsonschema", "filelock", "tokenizers",
    "triton", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.nn.attention.flex_attention",
)  # fmt: skip
"""Packages that tests import, as far as they are installed; those of pytest's plugins come with them."""


def import_shared() -> None:
    """Import what every fork needs, on one thread and with Triton's interpreter, as tests/conftest.py has it."""
    os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "ORT_DISABLE_TELEMETRY": "1"}
    for name in _SHARED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for plugin in entry_points(group="pytest11"):
        plugin.load()
    assert "n3c" not in sys.modules, "every fork has an n3c of its own"
    gc.freeze()  # a fork that collects garbage would copy all of it


class Tree:
    """A copy of the tree in `folder`, in which `n3c` is imported from the copy."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "tree"
        self.output = folder / "output.txt"
        """What the latest tests printed."""
        self.running = folder / "running.txt"
        """The test that runs; written when it begins."""
        ignored = shutil.ignore_patterns(".git", ".venv*", "build", "__pycache__", ".*_cache", "*.egg-info")
        shutil.copytree(ROOT, self.root, ignore=ignored, symlinks=True)
        (self.root / "import").mkdir()
        (self.root / "import/n3c").symlink_to(self.root / "typings/n3c")
        shutil.copy(calls.__file__, self.root / "import/sitecustomize.py")
        self._stamp = int(time.time())

    @contextlib.contextmanager
    def changed(self, path: str, text: str) -> Generator[None]:
        """Have another text in a file, with a time of its own: nobody takes compiled code for another text's."""
        place = self.root / path
        before, times = place.read_bytes(), place.stat()
        self._stamp += 2
        try:
            place.write_text(text, encoding="utf-8")
            os.utime(place, (self._stamp, self._stamp))
            if "numba" in "".join(file.read_text(encoding="utf-8") for file in place.parent.glob("*.py")):
                shutil.rmtree(self.folder / "numba", ignore_errors=True)  # inlined functions have no time stamp
            yield
        finally:
            place.write_bytes(before)
            os.utime(place, (times.st_atime, times.st_mtime))

    def pytest(self, arguments: Sequence[str], plugin: object, limit: float) -> int | None:
        """Return pytest's exit code; None where a test, or what stands before the first, took over `limit` seconds.

        A plugin that writes `running` when a test begins tells them apart; without one it is all of them.
        """

        def run() -> int:
            os.chdir(self.root)
            sys.path[:] = [str(self.root / "import"), *(place for place in sys.path if Path(place) != ROOT)]
            os.environ |= {"PYTHONPATH": str(self.root / "import"), "NUMBA_CACHE_DIR": str(self.folder / "numba")}
            if "numba" in sys.modules:
                sys.modules["numba"].config.CACHE_DIR = os.environ["NUMBA_CACHE_DIR"]
            given = ["-q", "-x", "-p", "no:cacheprovider", f"--basetemp={self.folder / 'tests'}", *arguments]
            return int(pytest.main(given, plugins=[plugin]))

        self.running.touch()
        code = _forked(run, self.output, self.running, limit)
        shutil.rmtree(self.folder / "tests", ignore_errors=True)
        return code


def _forked(work: Callable[[], int], output: Path, running: Path, limit: float) -> int | None:
    """Return what `work` returns in a fork, whose processes all end with it.

    None where it writes nothing to `running` for `limit` seconds.
    """
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 3
        try:
            os.setsid()
            to = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(to, 1)
            os.dup2(to, 2)
            code = work()
        finally:
            sys.stdout.flush()
            os._exit(code)
    try:
        while time.time() < running.stat().st_mtime + limit:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None
