"""The options of a request: what `generate` says of each is what the sampler takes."""

from __future__ import annotations

import inspect
import math
from dataclasses import MISSING, fields
from typing import Any

import pytest

from n3c.ir.diagnostics import N3CError
from n3c.runtime.generation.model import Model
from n3c.runtime.generation.sampling import Sampling
from n3c.runtime.generation.sequence import Options
from n3c.runtime.options import Option, Parameter, parameters_of

KNOWN = {field.name: (kind, field.default) for kind in (Sampling, Options) for field in fields(kind)}
NUMBERS = [p for p in parameters_of(Model.generate) if p.name in KNOWN and p.hint in (int, float)]
each = pytest.mark.parametrize("parameter", NUMBERS, ids=lambda parameter: parameter.name)


@each
def test_defaults_are_those_of_the_sampler(parameter: Parameter) -> None:
    kind, default = KNOWN[parameter.name]
    assert default is not MISSING
    assert parameter.default == default
    assert getattr(kind(), parameter.name) == default


@each
def test_bounds_are_those_of_the_sampler(parameter: Parameter) -> None:
    """A bound itself is taken by both, if it is one, and the next number beyond it by neither."""
    kind, _ = KNOWN[parameter.name]
    option = parameter.described
    assert isinstance(option, Option)
    whole = parameter.hint is int

    def taken(value: float) -> bool:
        given: dict[str, Any] = {parameter.name: value}
        try:
            kind(**given)
        except N3CError as error:
            assert error.diagnostics[0].code == "E0816"
            assert option.fault(value) is not None
            return False
        assert option.fault(value) is None
        return True

    def beyond(bound: float, towards: float) -> float:
        return int(bound + math.copysign(1, towards)) if whole else math.nextafter(bound, towards)

    assert (option.least is None) != (option.above is None)
    if option.least is not None:
        assert taken(option.least) and not taken(beyond(option.least, -math.inf))
    if option.above is not None:
        assert not taken(option.above) and taken(beyond(option.above, math.inf))
    if option.most is not None:
        assert taken(option.most) and not taken(beyond(option.most, math.inf))


def test_what_is_asked_for_only_where_it_is() -> None:
    """Without an option nothing is left out, forced, or read in another way."""
    switches = {p.name: p.default for p in parameters_of(Model.generate) if p.hint is bool}
    assert switches == dict.fromkeys(("ignore_eos", "chat", "parse_special"), False)
    assert inspect.signature(Model.generate).parameters["stream"].default is False
    assert not Sampling().penalizes
    for penalty in (
        Sampling(presence_penalty=1.5),
        Sampling(frequency_penalty=1.5),
        Sampling(repetition_penalty=1.5),
    ):
        assert penalty.penalizes


@pytest.mark.parametrize(("token", "bias"), [(0, 100), (0, -100), (7, 0.5)])
def test_biases_within_their_range(token: int, bias: float) -> None:
    assert Sampling(logit_bias={token: bias}).logit_bias == {token: bias}


@pytest.mark.parametrize(("token", "bias"), [(-1, 0), (0, 100.1), (0, -100.1)])
def test_biases_out_of_their_range(token: int, bias: float) -> None:
    with pytest.raises(N3CError, match=r"E0816.*`logit_bias`"):
        Sampling(logit_bias={token: bias})
