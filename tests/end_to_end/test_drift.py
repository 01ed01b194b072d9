"""Lowering and the PyTorch templates never see one another: that they describe one model is shown here.

The generated module and the reference evaluation of `forward` get the same checkpoint and the same tokens, and must
agree in logits, in loss, and in the gradient of every tensor of the checkpoint (`support.drift`).
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from jinja2 import Environment, FileSystemLoader

from n3c.backends.torch import emit as torch_backend
from n3c.specs.load import load_spec
from n3c.specs.schema import Spec
from support.copies import writable_copy
from support.drift import differences
from support.random_specs import specs
from support.small import cut_small
from support.specs import SPECS, small_spec

SHIPPED = sorted(path.stem for path in SPECS.glob("*.toml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_templates_are_what_lowering_says(name: str, tmp_path: Path) -> None:
    spec = cut_small(load_spec(SPECS / f"{name}.toml")[0])
    assert differences(spec, tmp_path) == []


@settings(max_examples=30, derandomize=True, phases=(Phase.generate,))
@given(specs(narrowest=8))
def test_of_random_specs(spec: Spec) -> None:
    """The gradient that passes a norm of one channel is rounding alone, so that there are several."""
    with tempfile.TemporaryDirectory() as folder:
        assert differences(replace(spec, quantization=None, training=None), Path(folder)) == []


@pytest.mark.parametrize(
    ("line", "changed", "seen"),
    [
        ("return F.relu(x).square()", "return F.relu(x)", "logits"),
        ("is_causal=True, enable_gqa=True", "is_causal=True, enable_gqa=True, scale=1.0", "logits"),
        ("weights * self.config.moe_routed_scaling_factor", "weights", "logits"),
        ("self.D[:, None], u", "self.D[:, None], 2 * u", "logits"),
        ("[self.enorm(embedding), self.hnorm(x)]", "[self.hnorm(x), self.enorm(embedding)]", "mtp0.logits"),
        ("dC = dcarried @", "dC = 2 * dcarried @", "gradient of backbone.layers.2.mixer.in_proj.weight"),
    ],
    ids=["mlp", "attention", "moe", "mamba2", "mtp", "written gradient"],
)
def test_a_template_changed_by_hand_is_found(
    line: str, changed: str, seen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`seen` is the first thing that differs: a gradient alone where the change is in a written gradient."""
    templates = tmp_path / "templates"
    writable_copy(Path(torch_backend.__file__).with_name("templates"), templates)
    holding = [path for path in templates.rglob("*.jinja") if line in path.read_text(encoding="utf-8")]
    assert len(holding) == 1
    holding[0].write_text(holding[0].read_text(encoding="utf-8").replace(line, changed), encoding="utf-8")
    made = vars(torch_backend)["_environment"]

    def environment(packages: tuple[str, ...]) -> Environment:
        overlaid: Environment = made(packages).overlay(loader=FileSystemLoader(templates))
        return overlaid

    monkeypatch.setattr(torch_backend, "_environment", environment)
    found = [difference.partition(":")[0] for difference in differences(small_spec(), tmp_path)]
    assert seen in found
    assert ("logits" in found) == (seen == "logits")
