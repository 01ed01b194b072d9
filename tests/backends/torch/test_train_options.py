"""What train.py says to options and settings that cannot be, and what it needs."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from n3c.backends.torch.emit import emit
from n3c.specs.schema import Training

from .generated import SHA256, tiny_spec
from .training_program import arguments, failure


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--batch-size", "3", "--accumulation", "2"], "--batch-size 3 does not divide into 1 processes x 2 parts"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--lr", "nan"], "lr = nan is not a number"),
        (["--seq-len", "9999999"], "--seq-len 9999999 is not from 2 to"),
        (["--settings", "none.toml"], "none.toml cannot be read"),
        (["--export-dtype", "float16"], "--export-dtype float16 is none of float32, bfloat16"),
        (["--activation-checkpointing", "moe,mtp"], "mtp is none of all, none, mamba2, moe, attention"),
        (["--numerics", "fp64"], "--numerics fp64 is none of float32, bf16"),
        (["--settings", "/dev/zero"], "larger than 65536 bytes"),
        (["--seed", "-1"], "--seed -1 is not from 0"),
        (["--seed", str(1 << 63)], "seed has more than 64 bits"),
        (["--batch-size", str(1 << 40)], "--batch-size 1099511627776 is more than 1048576"),
        (["--warmup", "0.9"], "--warmup and --decay must fit into --steps"),
        (["--warmup", "3"], "--warmup and --decay must fit into --steps"),
        (["--schedule", "step"], "--schedule step is none of wsd, cosine, linear"),
        (["--optimizer", "muon", "--numerics", "bf16-split"], "--optimizer muon cannot be combined with"),
        (["--train", "mtp.*"], "--train mtp.*: no weight has such a role; there are attention.k_proj"),
        (["--freeze", "moe.gate"], "--freeze moe.gate: no weight has such a role"),
        (["--freeze", "*"], "--train and --freeze leave nothing to train"),
        (["--ema", "1"], "--ema must be less than 1"),
        (["--document-separator", "256"], "--document-separator 256 is not from -1 to 255"),
        (
            ["--compile", "--activation-checkpointing", "--tensor-parallel", "2"],
            "--compile cannot be combined with --activation-checkpointing, --tensor-parallel",
        ),
        (["--expert-parallel", "0"], "--expert-parallel must be at least 1"),
        (["--expert-parallel", "2"], "--expert-parallel 2: start it with torchrun"),
    ],
)
def test_bad_usage(
    train: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], message: str
) -> None:
    assert message in failure(train, capsys, 2, *arguments(text, tmp_path / "out", *given))
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_settings_file(train: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(f'data = "{text}"\nout = "o"\nsteps = 9\nlr = 1\nnumerics = "bf16"\n')
    settings = train.settings.parse_settings("", ["--settings", str(path), "--steps", "5", "--numerics", "float32"])
    assert (settings.steps, settings.lr, settings.numerics, settings.data) == (5, 1.0, "float32", str(text))
    path.write_text('step = 1\nlr = "fast"\nsteps = 3\ndata = "d"\nout = "o"\n')
    said = failure(train, capsys, 2, "--settings", str(path))
    assert said == "step is no setting; lr = 'fast' is no float"


@pytest.mark.parametrize(
    ("given", "kinds"),
    [
        ([], "none"),
        (["--activation-checkpointing"], "all"),
        (["--no-activation-checkpointing"], "none"),
        (["--activation-checkpointing", "moe,mamba2"], "moe,mamba2"),
        ([True], "all"),
        ([False], "none"),
    ],
)
def test_blocks_that_are_computed_twice(train: Any, text: Path, tmp_path: Path, given: list[Any], kinds: str) -> None:
    """As options, and as booleans of a settings file."""
    if given and isinstance(given[0], bool):
        path = tmp_path / "settings.toml"
        path.write_text(f"activation_checkpointing = {str(given[0]).lower()}\n", "utf-8")
        given = ["--settings", str(path)]
    settings = train.settings.parse_settings("", arguments(text, tmp_path / "out", *given))
    assert settings.activation_checkpointing == kinds


class Mesh:
    """As much of a DeviceMesh as its size."""

    def __init__(self, size: int) -> None:
        self.count = size

    def __getitem__(self, _: str) -> Mesh:
        return self

    def size(self) -> int:
        return self.count


def test_sizes_that_do_not_divide(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them at once; 8 experts, 4 heads, 2 key-value heads, 8 Mamba-2 heads in 2 groups, widths 48 and 80."""
    require, meshes = train.parallelize.require_divisible, train.parallelize.Meshes
    with pytest.raises(ValueError, match="8") as error:
        require(train.model.Config(), meshes(Mesh(3), Mesh(3), Mesh(3), Mesh(3)))
    assert str(error.value).split("; ") == [
        "attention_num_heads 4 does not divide by 3 tensor-parallel processes",
        "mamba_num_heads 8 does not divide by 3 tensor-parallel processes",
        "mamba_n_groups 2 does not divide by 3 tensor-parallel processes",
        "moe_shared_intermediate_size 80 does not divide by 3 tensor-parallel processes",
        "attention_num_kv_heads 2 neither divides by nor into 3 tensor-parallel processes",
        "moe_num_experts 8 does not divide by 3 expert-parallel processes",
    ]
    require(train.model.Config(), meshes(Mesh(2), Mesh(2), Mesh(2), Mesh(2)))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 6)
    with pytest.raises(ValueError, match="6 processes do not divide into 2 expert-parallel x 2 tensor-parallel"):
        meshes.over_all("cpu", expert=2, tensor=2)


def test_needs_torch_and_safetensors_only() -> None:
    """And what torch itself needs, at once; rich, TensorBoard and what reads data when they are used."""
    files = emit(replace(tiny_spec(), training=Training("nvfp4")), SHA256)
    roots = set[str]()
    for name in (
        "train.py",
        *(
            name
            for name in files
            if name.startswith("tiny_test/") and not re.search("modeling|callbacks|kernels", name)
        ),
    ):
        for node in ast.parse(files[name]).body:
            if isinstance(node, ast.Import):
                roots |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                roots.add((node.module or "").partition(".")[0])
    assert roots - sys.stdlib_module_names == {"tiny_test", "torch", "safetensors", "filelock", "jinja2"}
    needed = " ".join(importlib.metadata.requires("torch") or [])
    assert "filelock" in needed and "jinja2" in needed
