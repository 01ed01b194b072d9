"""n3c doctor: what this machine can do."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from typing import Any

import click

from n3c.backends.added import added_backends
from n3c.backends.machine import memory_bytes
from n3c.compiler.cli import options
from n3c.compiler.cli.output import print_json, say
from n3c.compiler.report.tool_versions import version
from n3c.ir.diagnostics import N3CError, Span
from n3c.ir.extensions import entries
from n3c.passes.pipelines import added_stages
from n3c.specs.kinds import require_all

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
        say(f"{key:<18} {'not told by the system' if value is None else value}")
    say("")
    for name, installed in report["packages"].items():
        say(f"{name:<18} {installed or 'not installed':<16} {USES[name]}")
    say("")
    for name, works in report["targets"].items():
        say(f"--target {name:<9} {'yes' if works else 'no'}")
    if report["extensions"]:
        say("")
    for extension in report["extensions"]:
        say(f"{extension['distribution']:<26} {extension['group']:<13} {extension['name']:<18} {extension['state']}")


def examine() -> dict[str, Any]:
    """Return machine, package versions, targets and extensions, importing none of the packages, but extensions."""
    packages = {name: version(name) for name in USES}
    memory = memory_bytes()
    return {
        "machine": {
            "n3c": version("n3c"),
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "memory_gib": round(memory / 2**30, 1) if memory is not None else None,
            "disk_free_gib": round(shutil.disk_usage(".").free / 2**30, 1),
            "nvidia_driver": shutil.which("nvidia-smi") is not None,
        },
        "packages": packages,
        "targets": {
            "torch": True,
            "onnx": bool(packages["onnx"] and packages["onnx-ir"]),
            "trt": bool(packages["tensorrt-rtx"] or packages["tensorrt"]),
        },
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
