"""What TensorRT-RTX says to a portable plan and to one for SM 80 on this card: it may have no target for it."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from n3c.compiler import build
from n3c.ir.diagnostics import N3CError

from .part import SPECS, Row, Setting, report

TITLE = "Plans of TensorRT-RTX"


def run(setting: Setting) -> Iterator[Row]:
    """Build decode plans of specs/tiny.toml and load each; yield what the runtime answers, word for word."""
    try:
        trt: Any = importlib.import_module("tensorrt_rtx")
    except ImportError as error:
        yield {"what": "TensorRT-RTX", "skipped": f"not installed: {error}"}
        return
    for sm in ("portable", "80"):
        with tempfile.TemporaryDirectory() as folder:
            try:
                build(SPECS / "tiny.toml", target="trt", sm=sm, entry=["decode"], output=Path(folder) / "out")
            except N3CError as error:
                yield {"what": f"plan for {sm}", "error": str(error)[:600]}
                continue
            plan = next((Path(folder) / "out" / "trt").glob("decode.b1*.plan"))
            yield {"what": f"plan for {sm}", "bytes": plan.stat().st_size, **_load(trt, plan.read_bytes(), setting)}


def _load(trt: Any, plan: bytes, setting: Setting) -> dict[str, Any]:
    messages: list[str] = []

    class Logger(trt.ILogger):  # type: ignore[misc]  # the module is loaded by name
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR, trt.ILogger.WARNING):
                messages.append(f"{severity}: {message}")

    if setting.device != "cuda":
        return {"version": trt.__version__, "skipped": "no GPU: built, not loaded"}
    logger = Logger()
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    loaded: dict[str, Any] = {"version": trt.__version__, "loaded": engine is not None}
    if engine is not None:
        try:
            loaded["context"] = engine.create_execution_context() is not None
        except Exception as error:
            loaded["context"] = f"{type(error).__name__}: {error}"
    return loaded | {"messages": messages[:6]}


if __name__ == "__main__":
    report(run)
