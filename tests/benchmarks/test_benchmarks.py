"""The benchmarks start: what they measure is no test."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)


def test_every_benchmark_has_a_title_and_a_table() -> None:
    sys.path.insert(0, str(ROOT))
    try:
        registered = importlib.import_module("benchmarks.registry").BENCHMARKS
        for name in registered.values():
            module = importlib.import_module(name)
            assert module.TITLE
            assert callable(module.run)
    finally:
        sys.path.remove(str(ROOT))
    assert all(name in benchmarks("--help").stdout for name in registered)


def test_an_unknown_benchmark_is_a_usage_error() -> None:
    done = benchmarks("frob")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no benchmark frob" in done.stderr
