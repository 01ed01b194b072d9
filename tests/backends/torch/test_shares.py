"""What tensor-parallel processes share: in one process, whose peers only have a number."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from .data_files import program


@pytest.fixture
def rank() -> int:
    return 0


@pytest.fixture
def two_processes(rank: int) -> Iterator[None]:
    """Join a group as one of two processes; what the other one sends is nothing."""
    fake: Any = importlib.import_module("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group("fake", rank=rank, world_size=2, store=fake.FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.usefixtures("two_processes")
def test_a_process_computes_with_its_half_of_the_vocabulary(rank: int, tmp_path: Path) -> None:
    """Embeddings of the others' tokens are zeros, and so are their losses: a sum over processes has them all."""
    with program(tmp_path, 256) as train:
        model, parallelize = train.model.Model(), train.parallelize
        embedding, head = model.backbone.embeddings, model.lm_head
        rows, columns = embedding.weight.data.clone(), head.weight.data[128 * rank : 128 * (rank + 1)].clone()
        meshes = parallelize.Meshes.over_all("cpu", tensor=2)
        ids = torch.tensor([[0, 127, 128, 255]])
        own = ids // 128 == rank
        share = parallelize.share_of("backbone.embeddings", embedding, model.config, meshes)
        torch.testing.assert_close(share(ids), rows[ids] * own[..., None], rtol=0, atol=0)
        share = parallelize.share_of("lm_head", head, model.config, meshes)
        x = torch.randn(1, 4, 64)
        logits = (x @ columns.T)[own].repeat(1, 2)  # what is gathered of the other process is a copy
        losses = F.cross_entropy(logits, ids[own] - 128 * rank, reduction="sum")
        torch.testing.assert_close(share(x, ids), losses)


@pytest.mark.parametrize(("vocabulary", "shared"), [(256, True), (257, False)])
@pytest.mark.usefixtures("two_processes")
def test_a_vocabulary_is_shared_where_it_divides(vocabulary: int, shared: bool, tmp_path: Path) -> None:
    """Each process has half of the rows of embedding and head, or all of them."""
    with program(tmp_path, vocabulary) as train:
        model, parallelize = train.model.Model(), train.parallelize
        meshes = parallelize.Meshes.over_all("cpu", tensor=2)
        for name in ("backbone.embeddings", "lm_head"):
            module = model.get_submodule(name)
            assert (parallelize.share_of(name, module, model.config, meshes) is not None) == shared
            weight = module.weight.to_local() if shared else module.weight
            assert weight.shape == (vocabulary // 2 if shared else vocabulary, 64)
