"""Limits on the size of a model that can be verified."""

from __future__ import annotations

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError
from n3c.runtime.build_folder import OpenedBuild

MOST_PARAMETERS = 50_000_000
"""Of a model that is verified whole; every implementation of it is in memory at once, in float32."""
MOST_EVALUATED = 10_000_000
"""Parameters up to which the files of a build are evaluated by the ONNX reference evaluator."""


def parameters(build: OpenedBuild) -> int:
    """Return how many parameters the model has, those of multi-token prediction too."""
    count: int = build.manifest["parameters"]["total"] + build.manifest["parameters"]["mtp"]
    return count


def require_small(build: OpenedBuild) -> None:
    """Raise N3CError (E0822, exit code 4) where a model has too many parameters to be verified whole."""
    if parameters(build) > MOST_PARAMETERS:
        message = (
            f"the model has {parameters(build):,} parameters; verifying holds every implementation of it in float32 at"
            f" once, which is done up to {MOST_PARAMETERS:,}"
        )
        help_ = "verify the same kinds of layers in small: `n3c build --set model.pattern=… --set moe.num_experts=…`"
        raise N3CError(Diagnostic("E0822", message, help=help_), ExitCode.TARGET)
