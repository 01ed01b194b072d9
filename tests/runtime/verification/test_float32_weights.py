"""Weights that a checkpoint holds in float32, as a training run exports them, are deployed rounded: all forms agree."""

from __future__ import annotations

from pathlib import Path

import torch

from n3c.passes.lower.model import lower
from support.checkpoints import write_checkpoint
from support.command import n3c
from support.programs import random_tensors
from support.specs import SMALL, spec_from_text


def test_float32_weights(tmp_path: Path) -> None:
    text = SMALL.replace('"MEM*E-ME"', '"M*E"').replace("max_seq_len = 32", "max_seq_len = 32\nprefill_chunk = 16")
    (tmp_path / "spec.toml").write_text(text.lstrip())
    spec = spec_from_text(text)
    tensors = {name: t.float() * (1 + 1e-3 * torch.rand(t.shape)) for name, t in random_tensors(lower(spec)).items()}
    write_checkpoint(tmp_path / "weights", spec, tensors=tensors)
    assert n3c("build", tmp_path / "spec.toml", "--target", "torch", "-o", tmp_path / "out").code == 0
    assert n3c("verify", tmp_path / "out", "--weights", tmp_path / "weights").code == 0
