"""Targets: what can be built for which SM, without loading TensorRT."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Any

import pytest

from n3c.backends.trt.module import load_trt, version
from n3c.backends.trt.targets import PORTABLE, TARGETS, Flavour, lacking, require, sm_versions, unpublished
from n3c.ir.diagnostics import ExitCode, N3CError, Severity, Span
from n3c.ir.types import DType

SPAN = Span("m.toml", 7, 1)


FP4, FP8 = DType.F4E2M1, DType.F8E4M3


@pytest.mark.parametrize(
    ("sms", "lacked"),
    [
        ((120,), set()),
        ((121, 120), set()),
        ((89,), {FP4}),
        ((86,), {FP4, FP8}),
        ((80, 120), {FP4, FP8}),
        ((89, 120), {FP4}),
        (PORTABLE, {FP4, FP8}),
    ],
)
def test_what_a_plan_for_all_must_do_without(sms: tuple[int, ...], lacked: set[DType]) -> None:
    assert require(sms, "rtx", SPAN) == []
    assert lacking(sms) == lacked


@pytest.mark.parametrize(
    ("sms", "flavour", "codes"),
    [
        ((90,), "rtx", ["E0502"]),
        ((90, 100), "full", []),
        ((1, 120, 1), "rtx", ["E0502"]),
        ((75,), "rtx", ["E0503"]),
        ((75, 90, 7), "full", ["E0503", "E0502"]),
    ],
)
def test_what_cannot_be_built_for(sms: tuple[int, ...], flavour: Flavour, codes: list[str]) -> None:
    diagnostics = require(sms, flavour, SPAN)
    assert [d.code for d in diagnostics] == codes
    assert all(d.span == SPAN for d in diagnostics)


def test_what_nvidia_does_not_list_is_noted() -> None:
    (note,) = unpublished(PORTABLE)
    assert (note.code, note.severity) == ("W0520", Severity.NOTE)
    assert note.message.startswith("SM 80 (Ampere, A100) is outside NVIDIA's support matrix")
    assert unpublished((80,), "full") == unpublished((86, 89, 120, 121)) == unpublished((7,)) == []


def test_messages_tell_what_would_work() -> None:
    (fault,) = require((75,))
    assert "SM 75 (Turing, RTX 20) has no BF16 type" in fault.message
    assert fault.help == "build for SM 80, 86, 89, 120, 121"
    (fault,) = require((90,))
    assert fault.message == "TensorRT-RTX has no target SM 90 (Hopper, H100 and H200)"
    assert fault.help is not None and "89 (Ada, RTX 40)" in fault.help and "Hopper" not in fault.help
    assert require((3,))[0].message == "no target SM 3"


def test_the_table_is_that_of_tensorrt() -> None:
    capabilities = load_trt().ComputeCapability
    known = {name for name in dir(capabilities) if name.startswith("SM")}
    assert known == {f"SM{sm}" for sm, target in TARGETS.items() if "rtx" in target.flavours}
    assert all(target.flavours for target in TARGETS.values())


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


@pytest.mark.parametrize(
    ("given", "versions"),
    [
        ("sm_89", (89,)),
        ("8.9", (89,)),
        ("12.0", (120,)),
        ("sm120, 8.6 ,86", (120, 86)),
        ("native", (89, 120)),
        ("120,native", (120, 89)),
    ],
)
def test_spellings_of_an_sm_version(given: str, versions: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("n3c.backends.trt.targets.compute_capabilities", lambda: (89, 89, 120))
    assert sm_versions(given) == versions


@pytest.mark.parametrize("given", ["8.95", "sm_", "sm 89", "x8.9", "8.", "natives", "8.9.1", "\u0668.9"])
def test_what_is_no_sm_version(given: str) -> None:
    with pytest.raises(N3CError, match="is no SM version"):
        sm_versions(given)


def test_native_without_a_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("n3c.backends.trt.targets.compute_capabilities", tuple)
    with pytest.raises(N3CError, match="there is no NVIDIA GPU here") as caught:
        sm_versions("native")
    assert caught.value.exit_code is ExitCode.TARGET
