"""A loop of reinforcement learning in small: roll out, train, push the weights, and so on.

The trainer is the generated model in float32. Log-probabilities of the tokens that the engine drew are those that the
trainer computes for them, of weights that nobody quantizes; with drafts and prefixes that are kept.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from n3c.backends.torch.emit import emit
from n3c.backends.torch.loading import load_package
from n3c.compiler import build
from n3c.runtime.build_folder import open_build
from n3c.runtime.generation.runner import open_runner
from n3c.runtime.refit.rollouts import Rollouts
from n3c.specs.dump import dump_spec
from n3c.specs.load import loaded
from n3c.specs.shipped import spec_file

TOLERANCE = 1e-5
"""Of log-probabilities, in nats: float32 sums in another order, over ten layers."""
FLOAT = ('quantization.format="bf16"', "quantization.rules=[]", "serving.max_seq_len=64", "model.pattern=MEM*E")


def round_to_bf16(model: torch.nn.Module) -> None:
    """Let a trainer go on from what it gives away: the engine holds BF16."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_log_probabilities_agree_on_both_sides_after_every_update(engine: str, tmp_path: Path) -> None:
    spec, _ = loaded(spec_file("tiny"), (*FLOAT, "training.rules=[]"))
    (tmp_path / "spec.toml").write_text(dump_spec(spec))
    build(tmp_path / "spec.toml", target="torch", output=tmp_path / "out")
    package = load_package(emit(spec, "0" * 64))
    torch.manual_seed(0)
    model = package.Model(package.Config())
    package.save_checkpoint(model, tmp_path / "weights")
    round_to_bf16(model)
    runner = open_runner(
        open_build(tmp_path / "out"), tmp_path / "weights", engine=engine, sequences=4, continuous=True  # type: ignore[arg-type]
    )  # fmt: skip
    rollouts = Rollouts(runner, max_new_tokens=16, temperature=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    prompts = torch.tensor([[ord(c) for c in "to be or"]] * 4)
    data = {"input_ids": prompts, "input_lengths": torch.full((4,), 8)}
    for update in range(1, 4):
        assert rollouts.update_weights_from_tensors(model.state_dict())
        assert rollouts.updates.updates == update
        out = rollouts.generate(data, greedy=False)
        ids = out["output_ids"]
        given = torch.arange(1, ids.shape[1]) >= 8
        logits = model(ids).logits[:, :-1].float()
        ours = torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]
        difference = (ours - out["logprobs"][:, 1:]).abs()[:, given].max().item()
        assert difference < TOLERANCE, difference
        reward = (ids[:, 1:] < 128).float() - 0.5  # bytes of ASCII
        loss = -(reward * ours)[:, given].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        round_to_bf16(model)
