"""What is ONNX Runtime's own: telemetry, second places of states, graphs that it refuses."""

from __future__ import annotations

import importlib
import os
from types import SimpleNamespace
from typing import Any

import pytest

from n3c.backends.onnx.emit import emit_entry
from n3c.ir.diagnostics import ExitCode, N3CError
from n3c.runtime.engines.onnxruntime.engine import OnnxRuntimeEngine
from n3c.runtime.engines.onnxruntime.session import inference_session
from support.small_engine import SmallModel, small_model


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return small_model(tmp_path_factory.mktemp("engine"))


def test_states_that_are_no_caches_have_two_places(small: SmallModel) -> None:
    """A graph may still read the old value when it writes the new one."""
    plan = small.served.plan
    held = small.engine("onnxruntime", 3).allocated()
    assert held.spare_states == 3 * sum(state.bytes for state in plan.states if state.kind != "kv")
    assert plan.total_bytes == sum(-(-state.bytes // 256) * 256 for state in plan.states)


def test_telemetry_is_off_before_the_library_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)

    def session(model: bytes, options: Any, providers: list[str]) -> None:
        seen.append((model, providers))

    def fake_import(name: str) -> Any:
        seen.append((name, os.environ.get("ORT_DISABLE_TELEMETRY")))
        return SimpleNamespace(
            disable_telemetry_events=lambda: seen.append("disabled"),
            SessionOptions=SimpleNamespace,
            InferenceSession=session,
        )

    monkeypatch.setattr(importlib, "import_module", fake_import)
    inference_session(b"graph")
    assert seen == [("onnxruntime", "1"), "disabled", (b"graph", ["CPUExecutionProvider"])]


def test_a_graph_that_onnx_runtime_refuses(small: SmallModel) -> None:
    entry = emit_entry(small.served.program, "decode", batch=1, rendering="float32")
    next(iter(entry.model.graph)).op_type = "Nonsense"
    with pytest.raises(N3CError, match="Nonsense") as error:
        OnnxRuntimeEngine([entry], small.checkpoint, capacity=48)
    assert (error.value.diagnostics[0].code, error.value.exit_code) == ("E0812", ExitCode.TARGET)
