"""Releases of transformers, each in a small environment beside the one that tests run in, whose torch it shares."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]

RELEASES = ("5.12.1", "5.14.1", "5.17.0", "5.18.0", "5.23.0", "5.24.0")
"""Those that differ in how they spell block types (5.12, 5.14, 5.18) or the cache (5.24), and those in wide use."""


def python_of(release: str) -> Path:
    """Return the Python of the environment of a release; make it, from the package index, where there is none.

    Only what the release needs in another version than this environment has is installed (55 to 80 MB).
    Raises CalledProcessError where pip fails, AssertionError where another release is imported.
    """
    folder = Path(sys.prefix) / "transformers-releases" / release
    python = folder / "bin" / "python"
    if not (folder / "made").exists():
        shutil.rmtree(folder, ignore_errors=True)
        venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
        (packages,) = folder.glob("lib/python*/site-packages")
        shared = [path for path in sys.path if path.endswith("site-packages")]
        (packages / "shared.pth").write_text("\n".join(shared), encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
        install = ["install", "--quiet", "--no-compile", f"transformers=={release}"]
        subprocess.run([*pip, *install], check=True)
        found = run_python(release, "-c", "import transformers; print(transformers.__version__)", made=False)
        assert found.stdout.strip() == release, found.stdout + found.stderr
        (folder / "made").touch()
    return python


def run_python(release: str, *arguments: str, made: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the Python of a release in the repository, n3c and the tests' support importable; return what came of it."""
    python = python_of(release) if made else Path(sys.prefix) / "transformers-releases" / release / "bin" / "python"
    path = os.pathsep.join(str(ROOT / name) for name in ("typings", "tests"))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [str(python), *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
