"""The released shapes, built whole: minutes, so `make test-slow` runs them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from support.command import PROGRAM
from support.specs import SPECS

GIB = 2**30


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "experts"), [("nano", 23), ("super", 40), ("ultra", 48)], ids=["nano", "super", "ultra"]
)
def test_decode_plan_without_gpu_and_weights(name: str, experts: int, tmp_path: Path) -> None:
    out = tmp_path / "out"
    audit = built(name, out, "--entry", "decode")
    routed = [row for row in audit["linears"] if ".experts." in row["name"]]
    assert len(routed) == 2 * experts
    assert {row["realised"] for row in routed} == {"nvfp4"}
    assert (out / "trt" / "decode.b1.plan").stat().st_size < 50e6
    assert audit["traffic"]["entries"]["decode.b1"]["ratio"] < 1.10


@pytest.mark.slow
def test_every_entry_point_in_stages(tmp_path: Path) -> None:
    audit = built("super", tmp_path / "out", "--stages", "4")
    assert set(audit["traffic"]["entries"]) == {f"{entry}.b1" for entry in ("prefill", "decode", "verify", "draft")}
    assert audit["traffic"]["entries"]["verify.b1"]["ratio"] < 1.10


def built(name: str, out: Path, *options: str) -> dict[str, Any]:
    """Build the plans for one sequence, without weights, and return the audit, which has no mismatch."""
    arguments = ["build", str(SPECS / f"{name}.toml"), "--target", "trt", "--set", "serving.batch_sizes=[1]", *options]
    done = subprocess.run(
        [*PROGRAM, *arguments, "-o", str(out), "--json"], capture_output=True, text=True, timeout=550, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["peak_rss_bytes"] < 1.5 * GIB
    audit: dict[str, Any] = json.loads((out / "trt" / "audit.json").read_text())
    assert audit["summary"]["mismatches"] == 0
    return audit
