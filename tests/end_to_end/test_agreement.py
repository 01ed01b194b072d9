"""The legs agree on what a checkpoint holds: every tensor's name and shape, in the IR and in the generated code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from n3c.backends.torch.emit import emit
from n3c.backends.torch.loading import load_package
from n3c.compiler.report.cost import count_parameters
from n3c.ir.source import Stack, tensor_names
from n3c.passes.lower.model import lower
from n3c.specs.load import load_spec, parse_spec
from n3c.specs.schema import Spec
from support.random_specs import spec_texts
from support.specs import SPECS

Shapes = dict[str, tuple[int, ...]]


def shapes_of_the_ir(spec: Spec) -> Shapes:
    shapes: Shapes = {}
    for parameter in lower(spec).parameters.values():
        shape = parameter.type.static_dims[1 if isinstance(parameter.source, Stack) else 0 :]
        shapes |= dict.fromkeys(tensor_names(parameter.source), shape)
    return shapes


def shapes_of_the_code(spec: Spec) -> tuple[Shapes, int]:
    """Return the shapes on disk, and the number of parameters without MTP."""
    module = load_package(emit(spec, "0" * 64))
    with torch.device("meta"):
        model = module.Model()
    shapes = {name: tuple(tensor.shape) for name, tensor in module.named_tensors(model).items()}
    return shapes, sum(p.numel() for name, p in model.named_parameters() if not name.startswith("mtp."))


def assert_agreement(spec: Spec) -> None:
    code, parameters = shapes_of_the_code(spec)
    assert code == shapes_of_the_ir(spec)
    assert parameters == count_parameters(lower(spec), spec).total


@pytest.mark.parametrize("path", sorted(SPECS.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_specs(path: Path) -> None:
    assert_agreement(load_spec(path)[0])


@settings(max_examples=40)
@given(spec_texts())
def test_random_specs(text: str) -> None:
    assert_agreement(parse_spec(text, "spec.toml")[0])
