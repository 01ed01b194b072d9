"""Rules that say a choice: every weight gets the format that was chosen, whatever the choice."""

from __future__ import annotations

import random

import pytest

from n3c.compiler.quantization.calibration.activation_scales import ledger
from n3c.compiler.quantization.search.sensitivity import spec_with_formats
from n3c.compiler.quantization.units import find_units, unit_name
from n3c.specs.dump import dump_spec
from n3c.specs.load import parse_spec
from n3c.specs.schema import Spec
from support.specs import QUANTIZED, small_spec


def chosen_formats(spec: Spec) -> dict[str, str]:
    return {
        unit_name(entry.name.removesuffix(".weight")): entry.format
        for entry in ledger(spec)
        if entry.format not in ("bf16", "f32")
    }


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("mtp", [False, True])
def test_every_weight_gets_the_chosen_format(seed: int, mtp: bool) -> None:
    r = random.Random(seed)
    spec = small_spec(QUANTIZED)
    units = find_units(spec, "nvfp4", 1, mtp=mtp)
    formats = {unit.name: r.choice(unit.formats[: r.choice([1, 2, 3])]) for unit in units}
    made = spec_with_formats(spec, formats, (1, 16))
    assert chosen_formats(made) == {name: format_ for name, format_ in formats.items() if format_ != "bf16"}
    assert parse_spec(dump_spec(made), "again.toml")[0] == made


def test_a_role_that_agrees_is_one_rule() -> None:
    spec = small_spec()
    units = find_units(spec, "nvfp4", 1, mtp=False)
    formats = {unit.name: "fp8" if unit.linears[0].role.startswith("mamba.") else "nvfp4" for unit in units}
    made = spec_with_formats(spec, formats, (16, 16))
    assert made.quantization is not None
    assert (made.quantization.format, made.quantization.block) == ("nvfp4", (16, 16))
    assert [(rule.roles, rule.layers, rule.modules, rule.format) for rule in made.quantization.rules] == [
        (("mamba.in_proj", "mamba.out_proj"), "all", (), "fp8"),
        (("embedding", "mamba.conv1d", "moe.router", "mtp.*"), "all", (), "bf16"),
    ]


def test_nothing_of_the_old_rules_is_left() -> None:
    spec = small_spec(QUANTIZED)
    assert any(path.startswith("quantization") for path in spec.spans)
    made = spec_with_formats(spec, {}, (1, 16))
    assert not any(path.startswith("quantization") for path in made.spans)
    assert chosen_formats(made) == {}
