"""The format of each linear of model.py in training."""

from __future__ import annotations

from n3c.passes.lower.model import lower
from n3c.passes.training_formats import low_precision
from n3c.specs.schema import Spec


def training_formats(spec: Spec) -> list[tuple[str, str]]:
    """Return (generated module, format) of every linear that is not BF16, in the order in which they compute.

    The routed experts of a layer are one module for each projection.
    """
    if spec.training is None:
        return []
    return [(_module(weight.name), rule.format) for weight, rule in low_precision(spec, lower(spec))]


def _module(parameter: str) -> str:
    return parameter.removesuffix(".weight").replace(".*", "")
