"""Targets: what can be built for which SM, without loading TensorRT."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Any

import pytest

from n3c.backends.trt.module import load_trt, version
from n3c.backends.trt.targets import TARGETS, require
from n3c.ir.diagnostics import ExitCode, N3CError, Span

SPAN = Span("m.toml", 7, 1)


@pytest.mark.parametrize(
    ("sm", "formats", "codes"),
    [
        (120, ["nvfp4", "w4a16_nvfp4", "fp8", "bf16"], []),
        (121, ["nvfp4"], []),
        (89, ["fp8", "bf16"], []),
        (89, ["nvfp4", "fp8"], ["E0503"]),
        (86, ["nvfp4", "fp8", "bf16"], ["E0503", "E0503"]),
        (75, ["bf16"], []),
        (90, ["bf16"], ["E0502"]),
    ],
)
def test_formats_of_targets(sm: int, formats: list[str], codes: list[str]) -> None:
    diagnostics = require(sm, formats, SPAN)
    assert [d.code for d in diagnostics] == codes
    assert all(d.span == SPAN for d in diagnostics)


def test_messages_tell_what_would_work() -> None:
    (fault,) = require(86, ["nvfp4", "bf16", "nvfp4"])
    assert "SM 86 (Ampere, RTX 30) has no FP4 type" in fault.message
    assert fault.help is not None and "SM 120, 121" in fault.help
    (fault,) = require(1, ["bf16"])
    assert fault.help is not None and all(str(sm) in fault.help for sm in TARGETS)


def test_the_table_is_that_of_tensorrt() -> None:
    capabilities = load_trt().ComputeCapability
    known = {name for name in dir(capabilities) if name.startswith("SM")}
    assert known == {f"SM{sm}" for sm in TARGETS}


def test_targets_load_no_tensorrt() -> None:
    code = "import sys, n3c.backends.trt.targets; sys.exit('tensorrt_rtx' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_missing_tensorrt_is_an_error_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"No module named '{name}'")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(N3CError) as caught:
        load_trt("full")
    (diagnostic,) = caught.value.diagnostics
    assert (diagnostic.code, caught.value.exit_code) == ("E0501", ExitCode.TARGET)
    assert diagnostic.help == "install it with `pip install tensorrt`"


def test_version() -> None:
    assert version(load_trt()).startswith("tensorrt_rtx 1.")
