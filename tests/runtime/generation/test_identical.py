"""200 random prompts in engines whose states are really rolled back: drafts change no token, whoever drafts.

Verification computes several tokens at once, so its logits differ from those of decoding by rounding (see
docs/serving.md); no prompt here comes near enough to a tie for that to show.
"""

from __future__ import annotations

import numpy as np
import pytest

from n3c.passes.lower.model import lower
from n3c.passes.serving import serve
from n3c.runtime.engines.interface import Engine
from n3c.runtime.engines.onnxruntime.open import cpu_engine
from n3c.runtime.engines.torch.open import torch_engine
from n3c.runtime.engines.torch.weights import CheckpointWeights
from n3c.runtime.generation.capacity import Capacity
from n3c.runtime.generation.drafter import Drafter, MtpDrafter
from n3c.runtime.generation.loop import Generation
from n3c.runtime.generation.sequence import Options
from support.drafters import Oracle
from support.programs import random_tensors, save_tensors
from support.specs import SMALL, spec_from_text

VOCAB, BATCH, NEW = 97, 25, 9
TEXT = SMALL.replace('"MEM*E-ME"', '"M*E"').replace(
    "max_seq_len = 32", "max_seq_len = 32\nprefill_chunk = 8\ndraft_tokens = 3"
)


@pytest.fixture(scope="module", params=["onnxruntime", "torch"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    spec = spec_from_text(TEXT)
    served = serve(spec)
    checkpoint = save_tensors(random_tensors(lower(spec)), tmp_path_factory.mktemp("weights"))
    names = list(served.program.entry_points)
    if request.param == "torch":
        return torch_engine(served, spec, names, [BATCH], CheckpointWeights(checkpoint))
    return cpu_engine(served, spec, names, [BATCH], checkpoint)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(0, VOCAB, int(random.integers(1, 20))).tolist() for _ in range(200)]


def continued(engine: Engine, prompts: list[list[int]], drafter: Drafter | None) -> tuple[list[list[int]], float]:
    generation = Generation(engine, prompts, Options(max_new_tokens=NEW), Capacity(30, VOCAB), drafter=drafter)
    generation.run()
    return [sequence.new for sequence in generation.sequences], generation.statistics.acceptance_length


def test_two_hundred_prompts(engine: Engine, prompts: list[list[int]]) -> None:
    accepted: dict[str, list[float]] = {"right": [], "wrong": [], "random": [], "mtp": []}
    for at in range(0, len(prompts), BATCH):
        batch = prompts[at : at + BATCH]
        plain, _ = continued(engine, batch, None)
        drafters: dict[str, Drafter] = {
            kind: Oracle(batch, plain, kind, VOCAB) for kind in ("right", "wrong", "random")
        }
        for kind, drafter in (drafters | {"mtp": MtpDrafter()}).items():
            tokens, length = continued(engine, batch, drafter)
            assert tokens == plain, kind
            accepted[kind].append(length)
    assert set(accepted["wrong"]) == {1.0}
    assert min(accepted["right"]) == 4.0
    assert 1.5 < np.mean(accepted["random"]) < 3
