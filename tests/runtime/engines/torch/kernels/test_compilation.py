"""Every kernel compiles for the GPUs that it is meant for, and keeps its numbers in registers; no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Compute capability → bytes of shared memory that a program may have."""

EACH_KERNEL = (
    "linear.nvfp4.1.small", "linear.fp8.4", "linear.nvfp4.1024", "experts.nvfp4.8", "experts.bf16.512",
    "linear.coded.1.small", "experts.coded.8", "mamba.1", "attention.1", "norm.add", "gated_norm", "router",
    "rounding.nvfp4",
)  # fmt: skip


def compiled(folder: Path, capability: int, *options: str) -> list[dict[str, Any]]:
    """Return what `compile_offline.py` reports. No kernel may spill in a loop, or need more memory than there is."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder)}
    environment.pop("TRITON_INTERPRET", None)
    program = Path(__file__).parent / "compile_offline.py"
    done = subprocess.run(
        [sys.executable, str(program), str(capability), *options],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    reports: list[dict[str, Any]] = json.loads(done.stdout)
    for report in reports:
        assert report["spills"] <= 2, report  # a register set aside over a loop costs nothing
        assert report["shared"] <= SHARED_MEMORY[capability], report
    return reports


@pytest.mark.parametrize(
    "capability",
    [pytest.param(sm, marks=() if sm == 120 else pytest.mark.slow) for sm in SHARED_MEMORY],
)
def test_each_kernel(capability: int, tmp_path: Path) -> None:
    """From SM 90 on each kernel waits for the one before, and lets the next one start."""
    reports = compiled(tmp_path, capability, "--once", "--only", *EACH_KERNEL)
    assert {(report["waits"], report["starts_next"]) for report in reports} == {(capability >= 90,) * 2}
    assert {report["kernel"] for report in reports} == {
        "row_kernel", "tile_kernel", "sum_kernel", "dequantize_kernel", "few_pairs_kernel", "grouped_kernel",
        "combine_kernel", "conv_kernel", "step_kernel", "part_kernel", "join_kernel", "rms_norm_kernel",
        "gated_norm_kernel", "router_kernel", "rounding_kernel", "coding_kernel", "coded_row_kernel",
        "coded_pairs_kernel",
    }  # fmt: skip


def test_decoding_loads_16_bytes_a_thread(tmp_path: Path) -> None:
    """Eight rows of the matrix and their activations; block scales are two bytes for 16 of codes."""
    calls = ("linear.bf16.1", "linear.nvfp4.1.small", "linear.coded.1.small", "experts.nvfp4.1", "experts.coded.1")
    for report in compiled(tmp_path, 90, "--only", *calls):
        if report["kernel"] in ("row_kernel", "one_token_kernel", "coded_row_kernel", "coded_pairs_kernel"):
            assert report["loads"]["LDG.E.128"] >= 8, report
            assert report["registers"] <= 128, report  # 16 warps an SM
        if report["kernel"] in ("row_kernel", "coded_row_kernel"):
            assert report["loads_before_waiting"] >= 2, report


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_every_size(capability: int, tmp_path: Path) -> None:
    assert len(compiled(tmp_path, capability)) > 50
