"""The benchmarks start: what they measure is no test."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

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


def stop(_: Path) -> None:
    sys.exit(0)


def demo(work: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the demo's module, which stops before its work."""
    monkeypatch.syspath_prepend(str(ROOT))
    module = importlib.import_module("benchmarks.demo")
    monkeypatch.setattr(sys, "argv", ["demo", "--work", str(work)])
    monkeypatch.setattr(module, "copy_text", stop)
    return module


def test_the_demo_deletes_only_what_it_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine" / "run").mkdir(parents=True)
    (tmp_path / "mine" / "run" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for theirs in ("mine", "file"):
        with pytest.raises(SystemExit) as stopped:
            demo(tmp_path / theirs, monkeypatch).main()
        assert stopped.value.code == 2
    assert (tmp_path / "mine" / "run" / "notes.txt").read_text() == "mine"
    for _ in range(2):
        with pytest.raises(SystemExit) as stopped:
            demo(tmp_path / "new", monkeypatch).main()
        assert stopped.value.code == 0
        assert not (tmp_path / "new" / "nvfp4").exists()
        (tmp_path / "new" / "nvfp4").mkdir()
        (tmp_path / "new" / "notes.txt").write_text("mine")
    assert (tmp_path / "new" / "notes.txt").read_text() == "mine"


def gpu(out: Path, *names: str, timeout: int = 110) -> dict[str, Any]:
    """Run parts of the GPU's benchmark on a CPU, as a machine does that has a checkout alone."""
    command = [sys.executable, "-m", "benchmarks", "gpu", *names, "--device", "cpu", "--tiny", "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "typings")}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads((out / "gpu.json").read_text(encoding="utf-8"))
    assert (out / "gpu.md").read_text(encoding="utf-8").startswith("- date: ")
    return report


def test_parts_for_a_gpu_run_on_a_cpu(tmp_path: Path) -> None:
    parts = gpu(tmp_path, "ceilings", "scan")["parts"]
    assert all("problem" not in part for part in parts.values()), parts
    assert len(parts["ceilings"]["rows"]) == 3
    assert [row["scan"] for row in parts["scan"]["rows"] if "error" not in row] == ["pytorch", "n3c"]


def test_the_model_of_time_is_measured_by_kernels_of_its_forms(tmp_path: Path) -> None:
    part = gpu(tmp_path, "time_model")["parts"]["time_model"]
    assert "problem" not in part, part
    forms = [row["kernel"].split()[0] for row in part["rows"]]
    assert forms == ["sum", "sum", "sum", "chosen", "chosen", "values", "grouped"]
    assert all(float(row["error"]) < 1e-6 and row["predicted us"] >= 3 for row in part["rows"])


def test_what_a_part_has_started_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the part would be waited for until its children end, which hold its output open."""
    monkeypatch.syspath_prepend(ROOT)
    printed = importlib.import_module("benchmarks.gpu.run").printed
    inner = "import time; print('child', flush=True); time.sleep(600)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    assert printed([sys.executable, "-c", outer], os.environ, 4) == ("child\n", "", None)
    assert printed([sys.executable, "-c", "print(1); exit(3)"], os.environ, 60) == ("1\n", "", 3)


def test_what_the_budget_does_not_allow_is_told(tmp_path: Path) -> None:
    parts = gpu(tmp_path, "ceilings", "scan", "--budget", "0.1")["parts"]
    assert all("the budget of 0.1 s is spent" in part["skipped"] for part in parts.values())


def test_without_a_gpu_that_is_said(tmp_path: Path) -> None:
    done = benchmarks("gpu", "ceilings", "--out", str(tmp_path / "out"))
    if done.returncode:  # a machine with a GPU runs it
        assert (done.returncode, done.stdout) == (4, "")
        assert "PyTorch finds no GPU" in done.stderr
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_part_for_a_gpu_runs_on_a_cpu(tmp_path: Path) -> None:
    """Errors in rows are allowed where a row needs what is not installed: mamba_ssm."""
    for name, part in gpu(tmp_path, timeout=880)["parts"].items():
        assert "problem" not in part, (name, part)
        errors = [row["error"] for row in part["rows"] if "error" in row]
        assert all("mamba_ssm" in error for error in errors), (name, errors)
