"""Sidecars: a plan that cannot run here is refused before anything is loaded, with the command that rebuilds it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from n3c.backends.trt.plan_file import Sidecar, check_plan, read_sidecar, sidecar_path, write_sidecar
from n3c.ir.diagnostics import ExitCode, N3CError

PLAN = b"a plan" * 100


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "out" / "trt" / "decode.b1.plan"
    path.parent.mkdir(parents=True)
    path.write_bytes(PLAN)
    sha256 = hashlib.sha256(PLAN).hexdigest()
    write_sidecar(path, Sidecar("decode.b1", None, "rtx", "1.7.1.116", (86, 120), len(PLAN), sha256, "5bec", "bound"))
    return path


def refused(plan: Path, *, sm: int = 120, version: str = "1.7.1.116", **more: str) -> tuple[str, ExitCode, str, str]:
    with pytest.raises(N3CError) as caught:
        check_plan(plan, sm=sm, version=version, **more)  # type: ignore[arg-type]
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.span is not None
    return diagnostic.code, caught.value.exit_code, diagnostic.message, diagnostic.help or ""


def test_a_plan_for_this_machine(plan: Path) -> None:
    for sm in (86, 120):
        sidecar = check_plan(plan, sm=sm, version="1.7.1.116", spec_sha256="5bec")
    assert sidecar == read_sidecar(plan)
    assert (sidecar.entry, sidecar.stage, sidecar.sms) == ("decode.b1", None, (86, 120))


def test_another_gpu(plan: Path) -> None:
    code, exit_code, message, help_ = refused(plan, sm=89)
    assert (code, exit_code) == ("E0512", ExitCode.TARGET)
    assert message == "the plan is for SM 86,120, this GPU is SM 89 (Ada, RTX 40)"
    out = plan.parent.parent
    assert help_ == f"rebuild it: n3c build {out}/spec.toml --target trt --trt rtx --sm 86,120,89 -o {out}"


def test_another_version_and_another_flavour(plan: Path) -> None:
    code, exit_code, message, _ = refused(plan, version="1.8.0.2")
    assert (code, exit_code) == ("E0511", ExitCode.TARGET)
    assert message == "the plan was built by tensorrt_rtx 1.7.1.116, here is tensorrt_rtx 1.8.0.2"
    code, _, message, help_ = refused(plan, sm=90, version="11.4.0", flavour="full")
    assert (code, "--trt full --sm 90 " in help_) == ("E0511", True)
    assert message.endswith("here is tensorrt 11.4.0")


@pytest.mark.parametrize(
    ("content", "reason"),
    [(PLAN[:-1], "599 bytes instead of 600"), (b"b" + PLAN[1:], "another SHA-256"), (b"", "0 bytes instead of 600")],
)
def test_a_plan_that_was_cut_or_altered(content: bytes, reason: str, plan: Path) -> None:
    plan.write_bytes(content)
    code, exit_code, message, help_ = refused(plan)
    assert (code, exit_code) == ("E0640", ExitCode.FILE)
    assert message == f"the plan is not what was built: {reason}"
    assert help_.startswith("rebuild it: n3c build ")


def test_a_plan_that_is_gone_and_one_of_another_spec(plan: Path) -> None:
    assert refused(plan, spec_sha256="0000")[:2] == ("E0640", ExitCode.FILE)
    plan.unlink()
    assert "cannot be read (No such file or directory)" in refused(plan)[2]


def test_embedded_weights_are_rebuilt_embedded(plan: Path) -> None:
    write_sidecar(plan, replace(read_sidecar(plan), weights_mode="embedded"))
    assert " --weights-mode embedded --weights DIR " in refused(plan, sm=80)[3]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "null", '{"schema": 1}', "[" * 100_000, "\ud800"],
    ids=["empty", "array", "object", "null", "schema only", "deep", "not text"],
)
def test_a_sidecar_that_is_not_one(text: str, plan: Path) -> None:
    sidecar_path(plan).write_bytes(text.encode("utf-8", "surrogatepass"))
    code, exit_code, _, _ = refused(plan)
    assert (code, exit_code) == ("E0641", ExitCode.FILE)


@pytest.mark.parametrize(
    ("key", "value"),
    [("schema", 2), ("sms", 120), ("sms", ["x"]), ("bytes", "many"), ("stage", "0"), ("sha256", 7), ("tensorrt", [])],
)
def test_a_sidecar_with_a_wrong_value(key: str, value: object, plan: Path) -> None:
    data = json.loads(sidecar_path(plan).read_text())
    sidecar_path(plan).write_text(json.dumps(data | {key: value}))
    assert refused(plan)[0] == "E0641"


def test_a_missing_sidecar(plan: Path) -> None:
    sidecar_path(plan).unlink()
    code, _, message, _ = refused(plan)
    assert (code, message) == ("E0641", "the sidecar of a plan cannot be read: No such file or directory")


def test_no_library_is_loaded() -> None:
    code = "import sys, n3c.backends.trt.plan_file; sys.exit('tensorrt_rtx' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
