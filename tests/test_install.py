"""n3c installed from its wheel and from its source archive, in a bare virtual environment, far from the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from support.specs import SPECS

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command without what the repository's environment sets, and return what it prints."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel, and the sdist that it is built from, as setuptools makes them from a copy of the repository."""
    folder = tmp_path_factory.mktemp("dist")
    copy = folder / "source"
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "tests", "benchmarks")
    shutil.copytree(ROOT, copy, ignore=ignored)
    build = "from setuptools import build_meta as b; import sys; print(getattr(b, sys.argv[1])(sys.argv[2]))"
    run(sys.executable, "-c", build, "build_sdist", folder, cwd=copy)
    (sdist,) = folder.glob("*.tar.gz")
    unpacked = folder / "unpacked"
    shutil.unpack_archive(sdist, unpacked, filter="data")
    run(sys.executable, "-c", build, "build_wheel", folder, cwd=next(unpacked.iterdir()))
    (wheel,) = folder.glob("*.whl")
    return {"wheel": wheel, "sdist": sdist}


def program(environment: Path, name: str) -> Path:
    """Return a program of a virtual environment."""
    return environment / ("Scripts" if os.name == "nt" else "bin") / name


def use(environment: Path, folder: Path) -> None:
    """Check and compile a spec by the installed command."""
    shutil.copyfile(SPECS / "tiny.toml", folder / "tiny.toml")
    n3c = program(environment, "n3c")
    assert "ok" in run(n3c, "check", "tiny.toml", cwd=folder)
    run(n3c, "build", "tiny.toml", "--target", "onnx", "--entry", "decode", "-o", "out", cwd=folder)
    assert (folder / "out/onnx/decode.onnx").is_file()
    where = run(program(environment, "python"), "-c", "import n3c.compiler; print(n3c.compiler.__file__)", cwd=folder)
    assert Path(where.strip()).is_relative_to(environment)


def test_the_wheel_of_the_source_archive(archives: dict[str, Path], tmp_path: Path) -> None:
    """All files are in it: the dependencies are those of this environment, n3c is the wheel's."""
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", environment, cwd=tmp_path)
    python = program(environment, "python")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", archives["wheel"], cwd=tmp_path)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    dependencies = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    Path(site, "dependencies.pth").write_text("\n".join(dependencies) + "\n")
    use(environment, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_with_its_dependencies(archives: dict[str, Path], installer: str, kind: str, tmp_path: Path) -> None:
    """As a user installs it: dependencies from the package index."""
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", environment, cwd=tmp_path)
    python = program(environment, "python")
    if installer == "uv":
        run(python, "-m", "pip", "install", "--quiet", "uv", cwd=tmp_path)
        run(program(environment, "uv"), "pip", "install", "--python", python, archives[kind], cwd=tmp_path)
    else:
        run(python, "-m", "pip", "install", "--quiet", archives[kind], cwd=tmp_path)
    use(environment, tmp_path)
