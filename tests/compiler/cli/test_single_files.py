"""Commands that write one file: nothing of the user is lost without --force."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from n3c.specs.load import load_spec
from support.checkpoints import write_checkpoint
from support.command import n3c, tree, write_small


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    return write_small(tmp_path)


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_permissions_are_those_of_the_umask(spec: Path, tmp_path: Path, mask: int) -> None:
    old = os.umask(mask)
    try:
        assert n3c("export-config", spec, "-o", tmp_path / "config.json").code == 0
    finally:
        os.umask(old)
    assert (tmp_path / "config.json").stat().st_mode & 0o777 == 0o666 & ~mask
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", spec.name]


def test_a_file_that_is_there_is_left_without_force(spec: Path, tmp_path: Path) -> None:
    config, mine = tmp_path / "config.json", tmp_path / "mine"
    assert n3c("export-config", spec, "-o", config).code == 0
    mine.write_text("mine", encoding="utf-8")
    (tmp_path / "link").symlink_to("mine")
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "folder").mkdir()
    before = tree(tmp_path)
    for command, source in (("import", config), ("export-config", spec)):
        for name in ("mine", "link", "dangling"):
            result = n3c(command, source, "-o", tmp_path / name, "--json")
            assert (result.code, result.codes) == (6, ["E0602"]), name
            assert result.data["diagnostics"][0]["help"] == "--force overwrites it"
        for name in ("folder", source.name, "no/such/folder", "mine/below"):
            for force in ((), ("--force",)):
                result = n3c(command, source, "-o", tmp_path / name, "--json", *force)
                assert (result.code, result.codes) == (6, ["E0602"]), (name, force)
    assert tree(tmp_path) == before
    assert not (tmp_path / "nothing").exists()


def test_nothing_in_a_folder_that_is_read_is_overwritten(spec: Path, tmp_path: Path) -> None:
    """Not even with --force: weights, a build, a training run."""
    weights, out, run = tmp_path / "weights", tmp_path / "out", tmp_path / "run"
    write_checkpoint(weights, load_spec(spec)[0], shards=1)
    assert n3c("build", spec, "--target", "torch", "-o", out).code == 0
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n', encoding="utf-8")
    shard, before = next(weights.glob("*.safetensors")), tree(tmp_path)
    for command in (
        ("inspect", weights, "--html", shard),
        ("inspect", out, "--html", out / "manifest.json"),
        ("inspect", out, "--html", out / "torch" / "train.py"),
        ("inspect", spec, "--run", run, "--html", run / "metrics.jsonl"),
        ("diff", spec, weights, "--html", weights / "config.json"),
        ("import", weights, "-o", shard),
        ("quantize", spec, "--weights", weights, "-o", tmp_path / "q", "--auto", "--calibration", spec,
         "--effective-bits", 9, "--write-spec", shard),
    ):  # fmt: skip
        result = n3c(*command, "--force", "--json")
        assert (result.code, result.codes) == (6, ["E0602"]), command
        assert "which is read" in result.data["diagnostics"][0]["message"]
    assert tree(tmp_path) == before
    assert n3c("inspect", weights, "--html", weights / "page.html").code == 0  # which destroys nothing


def test_force_overwrites_and_a_link_stays_a_link(spec: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine", encoding="utf-8")
    (tmp_path / "link").symlink_to("mine")
    assert n3c("export-config", spec, "-o", tmp_path / "link", "--force").code == 0
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "mine").read_text(encoding="utf-8"))["model_type"] == "nemotron_h"


def test_the_input_under_another_name_is_the_input(spec: Path, tmp_path: Path) -> None:
    (tmp_path / "same.toml").symlink_to(spec)
    (tmp_path / "hard.toml").hardlink_to(spec)
    before = spec.read_bytes()
    for name in ("same.toml", "hard.toml", "../" + tmp_path.name + "/small.toml"):
        result = n3c("export-config", spec, "-o", tmp_path / name, "--force")
        assert result.code == 6 and "it is the file that is read" in result.err
    assert spec.read_bytes() == before


def test_quantize_refuses_before_any_work(spec: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "weights", load_spec(spec)[0], shards=1)
    (tmp_path / "mine.toml").write_text("mine", encoding="utf-8")
    work = ("quantize", spec, "--weights", tmp_path / "weights", "-o", tmp_path / "out")
    before = tree(tmp_path)
    for options in (
        ("--write-spec", tmp_path / "mine.toml"),
        ("--write-spec", spec, "--force"),
        ("--calibration", tmp_path / "ids.npy", "--save-activation-scales", tmp_path / "mine.toml"),
    ):
        result = n3c(*work, *options, "--json")
        assert (result.code, result.codes) == (6, ["E0602"]), options
    assert tree(tmp_path) == before
    assert n3c(*work, "--write-spec", tmp_path / "mine.toml", "--force").code == 0
    assert "[quantization]" in (tmp_path / "mine.toml").read_text(encoding="utf-8")
