"""One entry point in ONNX Runtime; n3c owns the memory of all its inputs and outputs."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from n3c.backends.onnx.emit import OnnxEntry
from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError
from n3c.runtime.engines.interface import Array, Port, Signature

DTYPES: Mapping[str, type[np.generic]] = {"f32": np.float32, "i64": np.int64}
"""All element types of the float32 rendering."""


class Session:
    """Binds buffers by address, so that nothing is copied on the way in or out.

    Raises N3CError (E0812, exit code 4) where ONNX Runtime refuses the graph.
    """

    def __init__(self, entry: OnnxEntry, weights: Mapping[str, Array]) -> None:
        self._entry = entry
        self._session = _load(entry)
        self._binding: Any = self._session.io_binding()
        for binding in entry.weights:
            self._bind_input(binding.name, weights[binding.name])
        self.states = [b.name for b in entry.arguments if b.kind == "state"]
        self._next = {b.source: b.name for b in entry.results if b.kind == "state"}
        self._inputs = [b for b in entry.arguments if b.kind == "input"]
        self._outputs = [b for b in entry.results if b.kind == "output"]
        self.signature = Signature(
            {b.name: Port(b.dtype, _dims(b.name, b.shape)) for b in self._inputs},
            {b.name: Port(b.dtype, _dims(b.name, b.shape)) for b in self._outputs},
        )

    def run(
        self, inputs: Mapping[str, Array], states: Mapping[str, Array], after: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Run on `inputs` and `states`; the states after the call go to `after`, which may be the same buffers."""
        feeds = {b.name: np.ascontiguousarray(inputs[b.name], DTYPES[b.dtype]) for b in self._inputs}
        outputs = {b.name: np.empty(b.shape, DTYPES[b.dtype]) for b in self._outputs}
        for name, array in feeds.items():
            self._bind_input(name, array)
        for name in self.states:
            self._bind_input(name, states[name])
            self._bind_output(self._next[name], after[name])
        for name, array in outputs.items():
            self._bind_output(name, array)
        self._session.run_with_iobinding(self._binding)
        return outputs

    def _bind_input(self, name: str, array: Array) -> None:
        self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def _bind_output(self, name: str, array: Array) -> None:
        self._binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _dims(name: str, shape: tuple[int, ...]) -> tuple[int | str, ...]:
    return tuple(name if size < 0 else size for size in shape)


def inference_session(model: bytes) -> Any:
    """Return a session on the CPU, of `OMP_NUM_THREADS` threads or one a core, with telemetry off.

    Raises what ONNX Runtime raises for a graph that it refuses.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when the library is imported
    runtime: Any = importlib.import_module("onnxruntime")  # it has no type stubs
    getattr(runtime, "disable_telemetry_events", lambda: None)()
    options: Any = runtime.SessionOptions()
    options.log_severity_level = 3  # it warns of each cache that it cannot write in place before it sees our buffers
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "0"))  # 0: one a core
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _load(entry: OnnxEntry) -> Any:
    try:
        return inference_session(entry.to_bytes())
    except Exception as error:  # ONNX Runtime's own classes share no base but Exception
        message = f"ONNX Runtime refuses `{entry.name}`: {error}"
        help_ = "a fault of n3c, or a version of ONNX Runtime that was not tried: report it"
        raise N3CError(Diagnostic("E0812", message, help=help_), ExitCode.TARGET) from error
