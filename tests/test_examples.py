"""The distributions of `examples/`: each is installed as a stranger's would be, and its own tests pass."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from support import shell
from support.copies import writable_copy
from support.pages import blocks

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.parent.name for path in EXAMPLES.glob("*/pyproject.toml"))
PIP = (sys.executable, "-m", "pip")
OFFLINE = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")


def install(name: str, folder: Path) -> Path:
    """Install an example into a folder of its own, without a network; return that folder."""
    source, site = folder / "source", folder / "site"
    writable_copy(EXAMPLES / name, source, "build", "*.egg-info")
    subprocess.run([*PIP, "install", *OFFLINE, "--target", str(site), str(source)], check=True, capture_output=True)
    return site


def environment(site: Path) -> dict[str, str]:
    """Return an environment in which n3c sees what is installed in `site`."""
    own = {name: value for name, value in os.environ.items() if name != "N3C_EXTENSIONS"}
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    return {**own, "PYTHONPATH": path}


@pytest.mark.parametrize("name", NAMES)
def test_an_example_passes_its_tests(name: str, tmp_path: Path) -> None:
    site = install(name, tmp_path)
    options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-o", "pythonpath=tests"]
    command = [sys.executable, "-m", "pytest", *options, "--rootdir", str(EXAMPLES / name), "tests"]
    ran = subprocess.run(
        command, cwd=EXAMPLES / name, env=environment(site), capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_what_is_installed_shows_in_the_commands(tmp_path: Path) -> None:
    site = install("gated-delta-net", tmp_path)

    def n3c(*arguments: str) -> str:
        command = [sys.executable, "-m", "n3c.compiler", *arguments]
        done = subprocess.run(command, env=environment(site), capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    doctor = n3c("doctor")
    for group in ("n3c.blocks", "n3c.passes", "n3c.backends"):
        (line,) = [line for line in doctor.splitlines() if group in line]
        assert line.startswith("n3c-gated-delta-net 0.1.0") and line.endswith("ok")
    assert "`serving.passes` of a spec adds it, after fuse_moe" in n3c("passes")
    assert '"gated_delta_net": {' in n3c("schema")
    assert ": ok (gated), 8 layers: 1 *, 4 -, 3 G" in n3c("check", str(EXAMPLES / "gated-delta-net/gated.toml"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the blocks are for a shell of Unix")
@pytest.mark.parametrize("name", NAMES)
def test_a_readme_runs_from_top_to_bottom(name: str, tmp_path: Path) -> None:
    """As it stands, but for pip's folder and options: checked, built, trained, resumed, quantized, verified, run."""
    site, work = tmp_path / "site", tmp_path / "work"
    writable_copy(EXAMPLES / name, work / "examples" / name, "build", "*.egg-info")
    variables = environment(site) | {"PATH": shell.environment(tmp_path)["PATH"]}
    pip = tmp_path / "bin/pip"
    pip.write_text(f'#!/bin/sh\nexec {shlex.join([*PIP])} "$@" {shlex.join([*OFFLINE, "--target", str(site)])}\n')
    pip.chmod(0o755)
    script = f"set -eux\n{script_of(name)}"
    done = subprocess.run(
        ["bash", "-c", script], env=variables, cwd=work, capture_output=True, text=True, timeout=540, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def script_of(name: str) -> str:
    """Return the blocks of commands of an example's README."""
    return "\n".join(block.code for block in blocks(EXAMPLES / name / "README.md"))
