"""n3c quantize with what is wrong: told with its place, exit code 6 or 3, and nothing left that looks like a result."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from n3c.backends.locks import locked
from n3c.backends.safetensors.packing import Packed, pack_nvfp4_rows
from n3c.passes.lower.model import lower
from support.checkpoints import policy_spec, write_checkpoint
from support.command import Result, n3c, n3c_program, tree
from support.programs import random_tensors

EXPERT = "backbone.layers.1.mixer.experts.5.up_proj.weight"
Change = Callable[[dict[str, Tensor]], None]


def quantize(source: Path, *more: object) -> Result:
    """Quantize `source` beside it; the source must stay as it is, and nothing be left where it fails."""
    out = source.parent / "out"
    before = tree(source) if source.is_dir() else {}
    names = {path.name for path in source.parent.iterdir()}
    result = n3c("quantize", "--weights", source, "-o", out, "--json", *more)
    if source.is_dir():
        assert tree(source) == before
    if result.code:
        assert {path.name for path in source.parent.iterdir()} == names
    return result


def refused(source: Path, code: str, *texts: str, exit_code: int = 6) -> None:
    result = quantize(source)
    assert (result.code, set(result.codes)) == (exit_code, {code}), result.err
    for text in texts:
        assert text in result.err
    assert result.data["diagnostics"][0]["file"]


def changed(tmp_path: Path, change: Change) -> Path:
    tensors = random_tensors(lower(policy_spec()))
    change(tensors)
    write_checkpoint(tmp_path / "model", policy_spec(), tensors=tensors, shards=2)
    return tmp_path / "model"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [EXPERT, "backbone.layers.0.mixer.out_proj.weight", "lm_head.weight"])
def test_what_is_not_finite_is_named_with_its_index(tmp_path: Path, name: str, value: float) -> None:
    def poison(tensors: dict[str, Tensor]) -> None:
        tensors[name][19, 7] = value

    refused(changed(tmp_path, poison), "E0607", f"`{name}` holds {value} at [19, 7]")


def test_missing_extra_and_misshapen_tensors(tmp_path: Path) -> None:
    def break_(tensors: dict[str, Tensor]) -> None:
        del tensors["backbone.norm_f.weight"]
        tensors["surprise.weight"] = torch.zeros(3, 16)
        tensors[EXPERT] = torch.zeros(48, 16)

    result = quantize(changed(tmp_path, break_))
    assert result.code == 6
    assert sorted(result.codes) == ["E0603", "E0606", "E0608"]


def test_a_width_that_no_block_divides(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", policy_spec())
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["n3c"]["quantization"]["rules"] = [{"roles": ["embedding"], "format": "bf16"}]
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    result = quantize(tmp_path / "model", "--block", "16x16")
    assert result.code == 3
    assert {"E0405"} <= set(result.codes) <= {"E0403", "E0404", "E0405"}


def header_of(file: Path) -> tuple[dict[str, dict[str, Any]], bytes]:
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def with_header(file: Path, text: bytes, data: bytes) -> None:
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def overlapping(file: Path) -> None:
    header, data = header_of(file)
    second = sorted((name for name in header if name != "__metadata__"), key=lambda n: header[n]["data_offsets"])[1]
    header[second]["data_offsets"] = [offset - 2 for offset in header[second]["data_offsets"]]
    with_header(file, json.dumps(header).encode(), data)


def lying_shape(file: Path) -> None:
    header, data = header_of(file)
    header[EXPERT]["shape"] = [4800, 32]
    with_header(file, json.dumps(header).encode(), data)


def twice(file: Path) -> None:
    header, data = header_of(file)
    entry = json.dumps(header[EXPERT])
    text = json.dumps(header)[:-1] + f', "{EXPERT}": {entry}}}'
    with_header(file, text.encode(), data)


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def unknown_type(file: Path) -> None:
    header, data = header_of(file)
    header[EXPERT]["dtype"] = "F8_E3M4"
    with_header(file, json.dumps(header).encode(), data)


def endless(file: Path) -> None:
    file.write_bytes(b"\xff" * 7 + b"\x0f" + file.read_bytes()[8:])


def negative(file: Path) -> None:
    header, data = header_of(file)
    header[EXPERT]["data_offsets"] = [-16, 0]
    with_header(file, json.dumps(header).encode(), data)


def nested(file: Path) -> None:
    with_header(file, b"[" * 100_000, b"")


def empty(file: Path) -> None:
    file.write_bytes(b"")


FILES = (overlapping, lying_shape, twice, truncated, unknown_type, endless, negative, nested, empty)


@pytest.mark.parametrize("damage", FILES)
def test_files_that_lie(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    write_checkpoint(tmp_path / "model", policy_spec(), shards=1)
    damage(tmp_path / "model/model.safetensors")
    refused(tmp_path / "model", "E0609", "model.safetensors")


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", policy_spec(), shards=2)
    shutil.copy(
        tmp_path / "model/model-00001-of-00002.safetensors", tmp_path / "model/model-00003-of-00003.safetensors"
    )
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    index["weight_map"]["another"] = "model-00003-of-00003.safetensors"
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path / "model", "E0609", "is in model-00001-of-00002.safetensors too")


@pytest.mark.parametrize("place", ["../other.safetensors", "/etc/other.safetensors", "gone.safetensors"])
def test_an_index_that_leads_elsewhere(tmp_path: Path, place: str) -> None:
    write_checkpoint(tmp_path / "model", policy_spec(), shards=2)
    index = tmp_path / "model/model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002-of-00002.safetensors", place))
    refused(tmp_path / "model", "E0604", place)


def test_an_index_with_a_key_twice(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", policy_spec(), shards=2)
    index = tmp_path / "model/model.safetensors.index.json"
    index.write_text(index.read_text()[:-2] + ', "a": "x.safetensors", "a": "y.safetensors"}}')
    refused(tmp_path / "model", "E0604")


def test_directories_that_are_no_checkpoint(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "E0601")
    write_checkpoint(tmp_path / "model", policy_spec())
    (tmp_path / "model/config.json").rename(tmp_path / "config.json")
    refused(tmp_path / "model", "E0601", "config.json")
    (tmp_path / "model/config.json").write_text("{", encoding="utf-8")
    result = quantize(tmp_path / "model")
    assert result.code == 3


@pytest.mark.parametrize(("option", "value"), [("--fmt", "nvfp5"), ("--block", "8x8"), ("--fmt", "")])
def test_values_that_are_none(tmp_path: Path, option: str, value: str) -> None:
    write_checkpoint(tmp_path / "model", policy_spec())
    result = quantize(tmp_path / "model", option, value)
    assert (result.code, result.codes) == (2, ["E0701"])
    assert result.data["diagnostics"][0]["file"] == option


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "1/0", "a/b"])
def test_parts_that_are_none(tmp_path: Path, part: str) -> None:
    assert quantize(tmp_path, "--part", part).code == 2


def test_a_quantized_checkpoint_is_not_quantized_again(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", policy_spec())
    assert quantize(tmp_path / "model").code == 0
    (tmp_path / "out").rename(tmp_path / "quantized")
    refused(tmp_path / "quantized", "E0605", "quantize the unquantized checkpoint")


def test_an_output_that_is_there(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", policy_spec())
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    for resume in ((), ("--resume",)):
        result = quantize(tmp_path / "model", *resume)
        assert (result.code, result.codes) == (6, ["E0611"])
    assert tree(tmp_path / "out") == {"mine.txt": b"mine"}
    (tmp_path / "out/mine.txt").unlink()
    assert quantize(tmp_path / "model").code == 0  # an empty directory is no output


def test_an_output_inside_the_source(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", policy_spec())
    before = tree(tmp_path / "model")
    for out in (tmp_path / "model/out", tmp_path / "model"):
        result = n3c("quantize", "--weights", tmp_path / "model", "-o", out, "--json")
        assert result.code == 6
        assert set(result.codes) <= {"E0611", "E0612"}
    assert tree(tmp_path / "model") == before


@pytest.mark.parametrize("option", ["--like", "--calibration", "--activation-scales"])
def test_an_output_inside_another_folder_that_is_read(option: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", policy_spec())
    (tmp_path / "read").mkdir()
    result = n3c("quantize", "--weights", tmp_path / "model", option, tmp_path / "read", "-o", tmp_path / "read/a/b",
                 "--json")  # fmt: skip
    assert (result.code, result.codes) == (6, ["E0612"])
    assert str(tmp_path / "read") in result.data["diagnostics"][0]["message"]
    assert not any((tmp_path / "read").iterdir())


def test_a_full_disk_leaves_what_can_be_resumed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", policy_spec())
    arguments = ("quantize", "--weights", tmp_path / "model", "-o", tmp_path / "out", "--max-shard-size", "60kb")

    def small_files() -> None:  # stands for a disk that is full: writing beyond fails
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    result = n3c_program(*arguments, "--json", before=small_files)
    assert (result.code, result.codes) == (6, ["E0613"])
    assert "--resume" in result.err
    assert not (tmp_path / "out").exists()
    assert n3c_program(*arguments, "--resume").code == 0
    once = tree(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert n3c_program(*arguments).code == 0
    assert tree(tmp_path / "out") == once


def test_too_little_space_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "model", policy_spec())

    def usage(_: Path) -> SimpleNamespace:
        return SimpleNamespace(free=1000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    refused(tmp_path / "model", "E0613", "the disk has")


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad sector: the header is fine, and then reading a weight fails."""
    write_checkpoint(tmp_path / "model", policy_spec(), shards=1)
    opened = Path.open

    def failing(path: Path, mode: str = "r", buffering: int = -1, **more: str) -> object:
        if buffering == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return opened(path, mode, buffering, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", failing)
        result = n3c("quantize", "--weights", tmp_path / "model", "-o", tmp_path / "out", "--json")
    assert (result.code, result.codes) == (6, ["E0601"])
    assert "Input/output error" in result.err
    assert not (tmp_path / "out").exists()
    assert quantize(tmp_path / "model", "--resume").code == 0


def test_a_result_that_is_not_what_the_ledger_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte that flips on its way to the disk is found by the check at the end."""
    write_checkpoint(tmp_path / "model", policy_spec())

    def flipped(*arguments: Any, **more: Any) -> Packed:
        result = pack_nvfp4_rows(*arguments, **more)
        result.codes[-1, -1] ^= 1
        return result

    monkeypatch.setattr("n3c.backends.safetensors.stream.pack_nvfp4_rows", flipped)
    refused(tmp_path / "model", "E0618", "bytes are not what its scales give")


def command_of(tmp_path: Path, *more: object) -> tuple[object, ...]:
    return ("quantize", "--weights", tmp_path / "model", "-o", tmp_path / "out", *more, "--json")


@pytest.mark.parametrize(
    ("at_work", "wanted", "refused_for"),
    [
        ("1/1", "1/1", "this output"),
        ("1/1", "2/3", "this output"),
        ("2/3", "1/1", "part 2 of 3"),
        ("2/3", "2/3", "part 2 of 3"),
        ("2/3", "1/2", "part 2 of 3"),
        ("2/3", "1/3", None),
    ],
)
def test_runs_at_the_same_shards_exclude_each_other(
    tmp_path: Path, at_work: str, wanted: str, refused_for: str | None
) -> None:
    write_checkpoint(tmp_path / "model", policy_spec())
    assert n3c(*command_of(tmp_path, "--part", "3/3")).code == 0  # leaves a plan, as any run does
    i, n = at_work.split("/")
    with locked(tmp_path / ".out.n3c-quantize" / "state" / f"part-{i}-of-{n}.lock"):
        before = tree(tmp_path)
        result = n3c(*command_of(tmp_path, "--resume", "--part", wanted))
        if refused_for is None:
            assert result.code == 0
            return
        assert (result.code, result.codes) == (6, ["E0617"])
        assert f"another process is at work on {refused_for}" in result.err
        assert "remove" not in result.err  # what another process works in is never to be removed
        assert tree(tmp_path) == before
    assert n3c(*command_of(tmp_path, "--resume")).code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_what_appears_as_the_output_meanwhile_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "model", policy_spec())

    def checked(*_: object) -> list[object]:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_text("mine", encoding="utf-8")
        return []

    with monkeypatch.context() as patch:
        patch.setattr("n3c.backends.modelopt.quantizer.check", checked)
        result = n3c(*command_of(tmp_path))
    assert (result.code, result.codes) == (6, ["E0611"])
    assert tree(tmp_path / "out") == {"notes.txt": b"mine"}
    shutil.rmtree(tmp_path / "out")
    assert n3c(*command_of(tmp_path, "--resume")).code == 0


def test_the_source_is_never_inside_the_working_folder(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / ".out.n3c-quantize" / "result", policy_spec())
    before = tree(tmp_path)
    result = n3c("quantize", "--weights", tmp_path / ".out.n3c-quantize/result", "-o", tmp_path / "out", "--json")
    assert (result.code, result.codes) == (6, ["E0612"])
    assert tree(tmp_path) == before


def test_a_link_to_an_empty_folder_stays_a_link(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", policy_spec())
    (tmp_path / "big").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "big")
    assert n3c(*command_of(tmp_path)).code == 0
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "big" / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big", "model", "out"]


@pytest.mark.parametrize("mask", [0o077, 0o002])
def test_permissions_are_those_of_the_umask(tmp_path: Path, mask: int) -> None:
    write_checkpoint(tmp_path / "model", policy_spec())
    old = os.umask(mask)
    try:
        assert n3c(*command_of(tmp_path)).code == 0
    finally:
        os.umask(old)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes and set(modes.values()) == {0o666 & ~mask}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask
