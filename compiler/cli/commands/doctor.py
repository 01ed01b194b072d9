"""n3c doctor: what this machine can do."""

from __future__ import annotations

import os
import platform
import shutil
from typing import Any

import click

from n3c.compiler.cli import options
from n3c.compiler.cli.output import print_json, say
from n3c.compiler.report.tool_versions import version

USES = {
    "torch": "generated code, reference evaluation",
    "onnx": "ONNX graphs",
    "onnx-ir": "ONNX graphs",
    "tensorrt-rtx": "TensorRT plans, no GPU needed",
    "tensorrt": "TensorRT plans with --trt full",
    "transformers": "parity tests",
    "nvidia-modelopt": "NVFP4 oracle",
    "transformer-engine": "NVFP4 training on Blackwell",
    "onnxruntime": "running ONNX graphs on a CPU",
}


@click.command("doctor", help="Say what this machine can do.")
@options.common
def command(as_json: bool) -> None:
    """Print the machine, the packages, and which targets work."""
    report = examine()
    if as_json:
        print_json(report)
        return
    for key, value in report["machine"].items():
        say(f"{key:<18} {value}")
    say("")
    for name, installed in report["packages"].items():
        say(f"{name:<18} {installed or 'not installed':<16} {USES[name]}")
    say("")
    for name, works in report["targets"].items():
        say(f"--target {name:<9} {'yes' if works else 'no'}")


def examine() -> dict[str, Any]:
    """Return machine, package versions and targets, importing none of the packages."""
    packages = {name: version(name) for name in USES}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "machine": {
            "n3c": version("n3c"),
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "memory_gib": round(memory / 2**30, 1),
            "disk_free_gib": round(shutil.disk_usage(".").free / 2**30, 1),
            "nvidia_driver": shutil.which("nvidia-smi") is not None,
        },
        "packages": packages,
        "targets": {
            "torch": True,
            "onnx": bool(packages["onnx"] and packages["onnx-ir"]),
            "trt": bool(packages["tensorrt-rtx"] or packages["tensorrt"]),
        },
    }
