"""`--init transformers` against the fresh weights of transformers' own `nemotron_h`."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import NemotronHConfig, NemotronHForCausalLM

from n3c.specs.huggingface import export_config
from support.fresh_weights import cut_super, profile, rows

from .generated import imported, write_generated


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return Super in a sixteenth of its widths, with fresh weights by each rule and by transformers."""
    spec = cut_super(16)
    folder = tmp_path_factory.mktemp("fresh")
    write_generated(spec, folder)
    with imported(folder) as modules:
        made: dict[str, Any] = {}
        for name in ("published", "transformers", "transformers' own"):
            torch.manual_seed(0)
            made[name] = modules.model.Model()
        rule = partial(modules.initialization.init_as_transformers, config=modules.model.Config())
        made["transformers"].apply(rule)
        NemotronHForCausalLM(NemotronHConfig(**export_config(spec))).save_pretrained(folder / "theirs")
        modules.checkpoint.load_checkpoint(made["transformers' own"], folder / "theirs")
    return made


def test_every_weight(models: dict[str, Any]) -> None:
    """Standard deviations to 3 %, all blocks of a kind together; vectors that are no chance, exactly."""

    def together(model: Any) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {}
        for name, weight in model.named_parameters():
            kind = ".".join(part for part in name.split(".") if not part.isdecimal())
            found.setdefault(kind, []).append(weight.detach().flatten())
        return {kind: torch.cat(weights) for kind, weights in found.items()}

    ours, theirs = together(models["transformers"]), together(models["transformers' own"])
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        if name.endswith(("A_log", "D", "norm.weight", "norm_f.weight", "conv1d.bias")):
            torch.testing.assert_close(weight, theirs[name], msg=name)
        else:
            few = name.endswith("dt_bias")
            assert float(weight.std()) == pytest.approx(float(theirs[name].std()), rel=0.15 if few else 0.03), name


def test_activations_by_depth(models: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """To 15 %; the published rule lets the residual stream grow less."""
    found = {name: profile(model) for name, model in models.items()}
    print(rows(found))
    torch.testing.assert_close(found["transformers"], found["transformers' own"], rtol=0.15, atol=0)
    assert found["published"][-3] < 0.5 * found["transformers"][-3]
