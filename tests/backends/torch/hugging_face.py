"""What the tests with transformers share: a generated package, its checkpoint, and who reads that."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, NemotronHForCausalLM, dynamic_module_utils

from n3c.backends.torch.loading import load_package
from n3c.specs.schema import Spec

from .generated import write_generated

IDS = torch.randint(97, (2, 13), generator=torch.Generator().manual_seed(5))


@contextmanager
def remote_code(folder: Path) -> Generator[None]:
    """Let transformers copy the code of checkpoints to `folder`, and import it from there, for a while."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
        patch.syspath_prepend(str(folder))
        yield


def build(spec: Spec, folder: Path) -> Any:
    """Write all files of a spec, as `n3c build` does, and import the package."""
    write_generated(spec, folder)
    return load_package(folder)


def trained(module: Any) -> Any:
    """Return a model whose time steps have left the range of fresh ones, as training lets them."""
    torch.manual_seed(0)
    model = module.Model().eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("dt_bias"):
                tensor.uniform_(-14.0, 1.0)
            elif name.endswith("e_score_correction_bias"):
                tensor.uniform_(-0.2, 0.2)
            elif "norm" in name:
                tensor.uniform_(0.5, 1.5)
    return model


def wrapped(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def native(folder: Path) -> Any:
    """Return transformers' own model, which it takes where it may run no code of the folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    assert isinstance(model, NemotronHForCausalLM)
    return model


def greedy(model: Any, prompt: Tensor, count: int) -> Tensor:
    """Return `prompt` [B, S] and `count` tokens more, by Model.step."""
    state, ids, new = model.allocate_state(len(prompt), prompt.shape[1] + count), prompt, prompt
    for _ in range(count):
        new = model.step(new, state)[:, -1:].argmax(-1)
        ids = torch.cat([ids, new], 1)
    return ids
