"""From a checkpoint that transformers saved to logits of generated code, through the command line alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.backends.torch.loading import load_package
from n3c.compiler.cli.main import run
from n3c.passes.lower.model import lower
from n3c.runtime.engines.reference.evaluate import evaluate
from n3c.specs.load import load_spec
from support.models import random_config, transformers_model
from support.programs import load_parameters

SEEDS = range(20)


@pytest.mark.parametrize("seed", SEEDS)
def test_checkpoint_to_logits(seed: int, tmp_path: Path) -> None:
    """Import → build --target torch --weights → logits, whole-sequence and token by token; and the IR's forward."""
    config = random_config(seed)
    model = transformers_model(config, seed)
    ids = torch.randint(0, config.vocab_size, (2, 13), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected = model(ids).logits
    model.save_pretrained(tmp_path / "checkpoint")
    checkpoint, spec, out = (str(tmp_path / name) for name in ("checkpoint", "spec.toml", "out"))

    assert run(["import", checkpoint, "-o", spec]) == 0
    assert run(["build", spec, "--target", "torch", "--weights", checkpoint, "-o", out]) == 0

    module = load_package(Path(out) / "torch")
    ours = module.Model(module.Config()).eval()
    module.load_checkpoint(ours, checkpoint)
    with torch.no_grad():
        whole = ours(ids).logits
        state = ours.allocate_state(2, ids.shape[1])
        steps = torch.cat([ours.step(ids[:, i : i + 1], state) for i in range(ids.shape[1])], dim=1)
    assert (whole - expected).abs().max() <= 1e-5
    assert (steps - expected).abs().max() <= 1e-5

    program = lower(load_spec(spec)[0])
    parameters = load_parameters(program, Checkpoint(Path(checkpoint)))
    in_bf16 = evaluate(program, "forward", {"input_ids": ids}, parameters).outputs[0]
    # the IR stores weights in BF16: the oracle is transformers with weights rounded likewise
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not name.endswith(("A_log", ".D", "dt_bias", "e_score_correction_bias")):
                tensor.copy_(tensor.bfloat16())
        assert (in_bf16 - model(ids).logits).abs().max() <= 1e-5
