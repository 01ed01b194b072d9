"""Which engine runs a build on a device."""

from __future__ import annotations

from typing import Literal

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError
from n3c.runtime.build_folder import OpenedBuild

Device = Literal["cpu", "cuda"]
EngineName = Literal["onnxruntime", "tensorrt", "torch", "reference"]

ENGINE_HELP = "What runs it (default: onnxruntime on cpu; on cuda tensorrt where the build has plans, else torch)."

DEVICES: dict[EngineName, tuple[Device, ...]] = {
    "onnxruntime": ("cpu",),
    "tensorrt": ("cuda",),
    "torch": ("cpu", "cuda"),
    "reference": ("cpu",),
}
"""Engine → the devices that it runs on."""


def choose_engine(engine: EngineName | None, device: Device, build: OpenedBuild) -> EngineName:
    """Return the engine that is asked for, else the usual one.

    That is ONNX Runtime on a CPU, and on a GPU TensorRT where the build has plans, else PyTorch. N3CError (E0707,
    exit code 2) for one that does not run on `device`.
    """
    if engine is None:
        return "onnxruntime" if device == "cpu" else "tensorrt" if build.has("trt/bindings.json") else "torch"
    require_device(engine, device)
    return engine


def require_device(engine: EngineName, device: Device) -> None:
    """Raise N3CError (E0707, exit code 2) where `engine` does not run on `device`."""
    if device not in DEVICES[engine]:
        there = [name for name, devices in DEVICES.items() if device in devices]
        help_ = f"`--device {DEVICES[engine][0]}`, or another engine: {', '.join(there)}"
        message = f"the engine `{engine}` does not run on the device `{device}`"
        raise N3CError(Diagnostic("E0707", message, help=help_), ExitCode.USAGE)
