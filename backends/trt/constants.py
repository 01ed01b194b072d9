"""Embedded weights in the builder's listing: they are constants there, under names that say more or less."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from math import prod

from n3c.backends.onnx.bindings import Binding

from .layers import Kernel, TensorInfo

_NAMED = re.compile(r"^(?P<name>.+)_constant\w+_myl\d+$")
_CODES = {"FP8": "f8e4m3", "FP4E2M1": "f4e2m1"}
"""Constants of these types lose their names, but are of the same layer, type and size."""


def weights_as_inputs(kernels: Sequence[Kernel], weights: Sequence[Binding]) -> tuple[Kernel, ...]:
    """Return `kernels` with the constants that are `weights` among the inputs, under the weights' names."""
    known = {binding.name: binding for binding in weights}
    found: dict[str, str] = {}
    made: list[Kernel] = []
    for kernel in kernels:
        moved: list[TensorInfo] = []
        kept: list[TensorInfo] = []
        for tensor in kernel.constants:
            name = found.get(tensor.name) or _weight(tensor, kernel, known, set(found.values()))
            if name is None:
                kept.append(tensor)
            else:
                found[tensor.name] = name
                moved.append(replace(tensor, name=name))
        made.append(replace(kernel, inputs=(*kernel.inputs, *moved), constants=tuple(kept)) if moved else kernel)
    return tuple(made)


def _weight(tensor: TensorInfo, kernel: Kernel, known: dict[str, Binding], taken: set[str]) -> str | None:
    match = _NAMED.match(tensor.name)
    if match and match["name"] in known:
        return match["name"]
    for label in kernel.labels if tensor.dtype in _CODES else ():
        for name, binding in known.items():
            alike = binding.dtype == _CODES[tensor.dtype] and prod(binding.shape) == tensor.elements
            if alike and name.startswith(f"{label}.") and name not in taken:
                return name
    return None
