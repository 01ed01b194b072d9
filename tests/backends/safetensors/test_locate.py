"""Checkpoints as they lie on disks: the Hugging Face cache, links, read-only folders, and what was not downloaded."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.backends.safetensors.locate import checkpoint_directory
from n3c.ir.diagnostics import ExitCode, N3CError
from support.checkpoints import write_checkpoint
from support.command import n3c, tree
from support.specs import small_spec

COMMIT, OTHER = "0123456789abcdef0123456789abcdef01234567", "f" * 40
HUB_ID = "nvidia/Small-Model-v2.BF16"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "hf"
    write_checkpoint(folder, small_spec(), with_spec=False)
    return folder


@pytest.fixture
def cache(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a Hugging Face cache with the checkpoint, laid out as huggingface_hub does, and not writable."""
    hub = tmp_path / "home" / "hub"
    repository = hub / f"models--{HUB_ID.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    for number, path in enumerate(sorted(plain.iterdir())):
        blob = repository / "blobs" / f"{number:064x}"
        shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
        blob.chmod(0o444)
    snapshot.chmod(0o555)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    yield repository
    snapshot.chmod(0o755)


def test_a_hub_id_is_its_cached_snapshot(cache: Path) -> None:
    snapshot = cache / "snapshots" / COMMIT
    assert checkpoint_directory(HUB_ID) == checkpoint_directory(cache) == snapshot
    assert checkpoint_directory(snapshot) == snapshot


@pytest.mark.parametrize("how", ["hub id", "repository", "snapshot", "config.json", "link"])
def test_the_name_is_that_of_the_repository(cache: Path, tmp_path: Path, how: str) -> None:
    """Not `blobs`, and not the hash of the commit."""
    snapshot = cache / "snapshots" / COMMIT
    (tmp_path / "mine").symlink_to(snapshot)
    places = {"repository": cache, "snapshot": snapshot, "config.json": snapshot / "config.json", "hub id": HUB_ID}
    result = n3c("import", places.get(how, tmp_path / "mine"), "--json")
    assert result.code == 0, result.err
    assert result.data["name"] == ("mine" if how == "link" else "small-model-v2.bf16")


def test_every_command_takes_a_hub_id(cache: Path, plain: Path, tmp_path: Path) -> None:
    made = n3c("quantize", "--weights", HUB_ID, "-o", tmp_path / "out", "--json")
    assert made.code == 0, made.err
    assert n3c("quantize", "--weights", plain, "-o", tmp_path / "same").code == 0
    one, other = tree(tmp_path / "out"), tree(tmp_path / "same")
    assert one["model.safetensors"] == other["model.safetensors"]
    assert os.access(tmp_path / "out/tokenizer.json", os.W_OK)
    assert n3c("inspect", HUB_ID, "--json").data["checkpoint"]["layout"] == "plain"
    assert n3c("import", HUB_ID, "-o", tmp_path / "spec.toml").code == 0
    built = n3c("build", tmp_path / "spec.toml", "--target", "torch", "--weights", HUB_ID, "-o", tmp_path / "built")
    assert built.code == 0, built.err


def refused(place: Path | str, text: str) -> str:
    with pytest.raises(N3CError) as caught:
        Checkpoint(checkpoint_directory(place))
    (diagnostic,) = caught.value.diagnostics
    assert caught.value.exit_code is ExitCode.FILE
    assert text in diagnostic.message, diagnostic.message
    return diagnostic.help or ""


def test_a_hub_id_that_is_not_cached(cache: Path) -> None:
    assert "`hf download nvidia/Other` fetches it" in refused("nvidia/Other", "not in the Hugging Face cache")


def test_a_hub_id_without_huggingface_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(HUB_ID, "not a directory")


def test_several_snapshots(cache: Path) -> None:
    (cache / "snapshots" / OTHER).mkdir()
    assert checkpoint_directory(cache).name == COMMIT
    (cache / "refs/main").unlink()
    assert OTHER in refused(cache, "a repository of the Hugging Face cache with 2 snapshots, none of them refs/main")
    (cache / "refs/main").write_text("../../../blobs")
    refused(cache, "with 2 snapshots")


def test_a_repository_without_snapshots(tmp_path: Path) -> None:
    (tmp_path / "models--a--b/snapshots").mkdir(parents=True)
    assert refused(tmp_path / "models--a--b", "with 0 snapshots") == "download it again"


@pytest.mark.parametrize(
    ("files", "text", "help_"),
    [
        (["model.safetensors"], "a Git LFS pointer", ""),
        (["model.safetensors.index.json"], "a Git LFS pointer", ""),
        (["pytorch_model.bin", "config.json"], "`pytorch_model.bin`: weights pickled by PyTorch", "save_pretrained"),
        (["consolidated.00.pth"], "weights pickled by PyTorch", "safetensors"),
        (["model-q4.gguf"], "weights of llama.cpp", "safetensors"),
        (
            ["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"],
            "2 of 3 shards, as `model-00001-of-00003.safetensors`, and no model.safetensors.index.json",
            "download the index",
        ),
        (["adapter.safetensors"], "`adapter.safetensors` has another name", ""),
        (["config.json"], "neither model.safetensors nor model.safetensors.index.json in this directory", ""),
    ],
)
def test_what_is_there_instead_is_told(tmp_path: Path, files: list[str], text: str, help_: str) -> None:
    for name in files:
        (tmp_path / name).write_bytes(POINTER)
    assert help_ in refused(tmp_path, text)


def test_a_pointer_instead_of_the_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(POINTER)
    result = n3c("import", tmp_path, "--json")
    assert (result.code, result.codes) == (3, ["E0301"])
    assert "a Git LFS pointer" in result.data["diagnostics"][0]["message"]


def test_shards_that_were_not_downloaded_are_one_line(tmp_path: Path) -> None:
    names = [f"model-{i:05d}-of-00050.safetensors" for i in range(1, 51)]
    index = {"metadata": {}, "weight_map": {f"t{i}": name for i, name in enumerate(names)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    help_ = refused(tmp_path, "of 50 files in the index 50 are missing: `model-00001-of-00050.safetensors`, ")
    assert "download the checkpoint again" in help_


@pytest.mark.parametrize("to", ["an empty folder", "nothing"])
def test_the_output_may_be_a_link(plain: Path, tmp_path: Path, to: str) -> None:
    target, link = tmp_path / "disk" / "target", tmp_path / "link"
    target.parent.mkdir()
    if to == "an empty folder":
        target.mkdir()
    link.symlink_to(target)
    result = n3c("quantize", "--weights", plain, "-o", link)
    assert result.code == 0, result.err
    assert link.is_symlink()
    assert (target / "model.safetensors").is_file()
    assert list(target.parent.iterdir()) == [target]


def test_the_output_may_be_the_working_directory(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who stands in it stays in it: it is filled, not replaced."""
    here = tmp_path / "here"
    here.mkdir()
    number = here.stat().st_ino
    monkeypatch.chdir(here)
    result = n3c("quantize", "--weights", plain, "-o", ".")
    assert result.code == 0, result.err
    assert here.stat().st_ino == number
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {path.name for path in here.iterdir()}
    assert list(tmp_path.iterdir()) == [here]
    again = n3c("quantize", "--weights", plain, "-o", ".", "--json")
    assert (again.code, again.codes) == (6, ["E0611"])
