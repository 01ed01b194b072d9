"""Full TensorRT: the same code up to the builder call, with a stand-in that records what it is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from n3c.backends.trt.build import build_plan
from n3c.backends.trt.module import flavour_of, load_trt, version
from n3c.ir.diagnostics import ExitCode, N3CError
from support.fake_tensorrt import StandIn


def test_what_the_builder_is_asked(tmp_path: Path) -> None:
    trt = StandIn()
    ranges = {"key_positions": (1, 64, 512)}
    result = build_plan(b"onnx", tmp_path / "x.plan", trt, sms=(90,), ranges=ranges)
    assert trt.calls == [
        ("network", 1 << 3),
        ("parse", b"onnx"),
        ("profile", {"key_positions": ((1,), (64,), (512,))}),
        ("build", 2),
    ]
    assert trt.config.profiling_verbosity is trt.ProfilingVerbosity.DETAILED
    assert not hasattr(trt.config, "hardware_compatibility_level")  # for the GPU at hand alone
    assert not hasattr(trt.config, "num_compute_capabilities")
    assert trt.attention.decomposable
    assert (tmp_path / "x.plan").read_bytes() == b"engine!"
    assert (result.bytes, result.scratch_bytes, [k.name for k in result.kernels]) == (7, 512, ["k0"])


def test_several_gpus_are_the_nearest_that_it_has(tmp_path: Path) -> None:
    trt = StandIn()
    build_plan(b"onnx", tmp_path / "x.plan", trt, sms=(80, 90))
    assert trt.config.hardware_compatibility_level is trt.HardwareCompatibilityLevel.AMPERE_PLUS


def test_targets_are_its_own(tmp_path: Path) -> None:
    """Hopper is no target of TensorRT-RTX, and both refuse what nobody knows."""
    with pytest.raises(N3CError) as caught:
        build_plan(b"onnx", tmp_path / "x.plan", load_trt("rtx"), sms=(90,))
    assert "TensorRT-RTX has no target SM 90" in caught.value.diagnostics[0].message
    with pytest.raises(N3CError) as caught:
        build_plan(b"onnx", tmp_path / "x.plan", StandIn(), sms=(91,))
    assert caught.value.diagnostics[0].message == "no target SM 91"


def test_a_builder_that_fails(tmp_path: Path) -> None:
    with pytest.raises(N3CError) as caught:
        build_plan(b"onnx", tmp_path / "x.plan", StandIn(fails="no\nmemory"), sms=(90,))
    (diagnostic,) = caught.value.diagnostics
    assert (diagnostic.code, caught.value.exit_code) == ("E0505", ExitCode.TARGET)
    assert diagnostic.message == "the TensorRT builder fails for SM 90: no memory"
    assert list(tmp_path.iterdir()) == []


def test_which_is_which() -> None:
    assert (flavour_of(StandIn()), version(StandIn())) == ("full", "tensorrt 11.4.0.3")
    assert flavour_of(load_trt("rtx")) == "rtx"
