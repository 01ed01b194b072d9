"""n3c doctor: what this machine can do."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from typing import Any

from n3c.backends.added import added_backends
from n3c.backends.machine import devices, driver_version, memory_bytes
from n3c.compiler.cli import options
from n3c.compiler.cli.command import n3c_command
from n3c.compiler.cli.output import print_json, say
from n3c.compiler.cli.table import format_table
from n3c.compiler.report.abilities import abilities, narrow_types
from n3c.compiler.report.tool_versions import version
from n3c.compiler.report.units import format_bytes
from n3c.ir.diagnostics import N3CError, Span
from n3c.ir.extensions import entries
from n3c.passes.pipelines import added_stages
from n3c.specs.kinds import require_all

USES = {
    "torch": "generated code, reference evaluation",
    "onnx": "ONNX graphs",
    "onnx-ir": "ONNX graphs",
    "onnxruntime": "running on a CPU",
    "tokenizers": "text in and out of a model",
    "tensorrt-rtx": "TensorRT plans, no GPU needed",
    "tensorrt": "TensorRT plans with --trt full",
    "transformer-engine": "NVFP4 training on Blackwell",
    "transformers": "parity tests",
    "nvidia-modelopt": "NVFP4 oracle",
}


@n3c_command(
    "doctor",
    "Say what this machine can do.",
    examples=(("GPUs, packages, and what they let you do", "n3c doctor"),),
)
@options.common
def command(as_json: bool) -> None:
    """Print the machine, its GPUs, the packages, and what they let one do."""
    report = examine()
    if as_json:
        print_json(report)
        return
    for key, value in report["machine"].items():
        say(f"{key:<18} {'not found' if value is None else value}")
    if report["gpus"]:
        gpus = [
            (gpu["name"], str(gpu["sm"]), format_bytes(gpu["memory_bytes"]), narrow_types(gpu["sm"]))
            for gpu in report["gpus"]
        ]
        say("\n" + format_table(("GPU", "SM", "memory", "tensor cores"), gpus))
    packages = [(name, installed or "not installed", USES[name]) for name, installed in report["packages"].items()]
    say("\n" + format_table(("package", "version", "for"), packages))
    able = [(entry["what"], "no" if entry["lacks"] else "yes", entry["lacks"]) for entry in report["abilities"]]
    say("\n" + format_table(("what it lets you do", "", "what that needs"), able))
    added = [(each["distribution"], each["group"], each["name"], each["state"]) for each in report["extensions"]]
    if added:
        say("\n" + format_table(("extension", "adds to", "name", "state"), added))


def examine() -> dict[str, Any]:
    """Return machine, GPUs, package versions, what they let one do, and extensions; imports none but the extensions."""
    packages, gpus, memory = {name: version(name) for name in USES}, devices(), memory_bytes()
    return {
        "machine": {
            "n3c": version("n3c"),
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "memory_gib": round(memory / 2**30, 1) if memory is not None else None,
            "disk_free_gib": round(shutil.disk_usage(".").free / 2**30, 1),
            "nvidia_driver": driver_version(),
        },
        "gpus": [gpu.as_json() for gpu in gpus],
        "packages": packages,
        "targets": {
            "torch": True,
            "onnx": bool(packages["onnx"] and packages["onnx-ir"]),
            "trt": bool(packages["tensorrt-rtx"] or packages["tensorrt"]),
        },
        "abilities": [ability.as_json() for ability in abilities(packages, gpus)],
        "extensions": list(_extensions()),
    }


def _extensions() -> Iterator[dict[str, str]]:
    """Yield what installed distributions add, each with its state: `ok`, or what is wrong with it."""
    for group, load in (("n3c.blocks", require_all), ("n3c.passes", added_stages), ("n3c.backends", added_backends)):
        broken: dict[Span | None, str] = {}
        try:
            load()
        except N3CError as error:
            broken = {diagnostic.span: diagnostic.message for diagnostic in error.diagnostics}
        for entry in entries(group):
            state = broken.get(entry.place, "ok")
            yield {"group": group, "name": entry.name, "distribution": entry.distribution, "state": state}
