"""The weights that a build is verified with."""

from __future__ import annotations

from pathlib import Path

from n3c.backends.onnx.bindings import read_bindings
from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.backends.safetensors.checkpoint_fit import fitting_checkpoint
from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError
from n3c.passes.lower.model import lower
from n3c.runtime.build_folder import OpenedBuild

from .random_weights import RandomCheckpoint


def checkpoint_for(build: OpenedBuild, directory: Path | None, seed: int) -> Checkpoint:
    """Open the checkpoint of `directory`, which must fit, or make random weights.

    N3CError (E0808, exit code 2) where the build holds weights, which random ones would never equal.
    """
    if directory is not None:
        return fitting_checkpoint(build.spec, directory)
    for folder in ("trt", "onnx"):
        file = build.out / folder / "bindings.json"
        if build.has(f"{folder}/bindings.json") and read_bindings(file).weights_mode == "embedded":
            help_ = "name the checkpoint that it was built with: --weights DIR"
            raise N3CError(Diagnostic("E0808", "this build holds its weights", help=help_), ExitCode.USAGE)
    return RandomCheckpoint(lower(build.spec), seed)
