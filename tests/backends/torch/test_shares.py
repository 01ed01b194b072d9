"""What tensor-parallel processes share: in one process, whose peers only have a number."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from .data_files import program


@pytest.fixture
def two_processes() -> Iterator[None]:
    """Join a group as number 0 of two processes; what the other one sends is nothing."""
    fake: Any = importlib.import_module("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group("fake", rank=0, world_size=2, store=fake.FakeStore())
    yield
    dist.destroy_process_group()


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
