"""bindings.json at the bounds of what a build writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from n3c.backends.onnx.bindings import read_bindings
from n3c.ir.diagnostics import ExitCode, N3CError


def written(folder: Path, stage: object) -> Path:
    entry = {"onnx": "onnx/decode.b1.onnx", "stage": stage, "inputs": [], "outputs": [], "weights": []}
    path = folder / "bindings.json"
    path.write_text(json.dumps({"schema": 1, "weights_mode": "bound", "weights": [], "entries": {"decode.b1": entry}}))
    return path


@pytest.mark.parametrize("stage", [None, 0, 9999])
def test_stages(stage: int | None, tmp_path: Path) -> None:
    assert read_bindings(written(tmp_path, stage)).entries["decode.b1"].stage == stage


@pytest.mark.parametrize("stage", [-1, 10000, 1.0, True, "1"])
def test_what_is_no_stage(stage: object, tmp_path: Path) -> None:
    with pytest.raises(N3CError) as caught:
        read_bindings(written(tmp_path, stage))
    assert (caught.value.diagnostics[0].code, caught.value.exit_code) == ("E0640", ExitCode.FILE)
