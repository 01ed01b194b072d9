"""Checkpoints of a generated model: the released layout, exactness, and files that are not what they should be."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from n3c.specs.convert import run_import
from n3c.specs.huggingface import export_config

from .generated import KEPT_FLOAT32, generate, tiny_spec


@pytest.fixture(scope="module")
def module() -> Any:
    return generate(tiny_spec())


@pytest.fixture
def saved(module: Any, tmp_path: Path) -> Path:
    torch.manual_seed(5)
    module.save_checkpoint(module.Model(), tmp_path / "saved")
    return tmp_path / "saved"


def rewrite(folder: Path, change: Any) -> None:
    """Apply `change` to the tensors of model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def rename(folder: Path, change: Callable[[str], str]) -> None:
    """Give the tensors of model.safetensors other names."""
    tensors = load_file(folder / "model.safetensors")
    save_file({change(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")


def split(folder: Path, count: int = 3) -> dict[str, str]:
    """Turn model.safetensors into shards with an index; return its weight map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"part-{i % count}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_names_are_those_of_the_released_checkpoint(saved: Path) -> None:
    with safe_open(saved / "model.safetensors", framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert shapes["backbone.embeddings.weight"] == shapes["lm_head.weight"] == (97, 64)
    assert shapes["backbone.norm_f.weight"] == shapes["backbone.layers.7.norm.weight"] == (64,)
    assert shapes["backbone.layers.0.mixer.conv1d.weight"] == (192, 1, 4)
    assert shapes["backbone.layers.0.mixer.in_proj.weight"] == (328, 64)
    assert shapes["backbone.layers.1.mixer.experts.7.up_proj.weight"] == (48, 32)
    assert shapes["backbone.layers.1.mixer.experts.0.down_proj.weight"] == (32, 48)
    assert shapes["backbone.layers.1.mixer.gate.e_score_correction_bias"] == (8,)
    assert shapes["backbone.layers.3.mixer.o_proj.weight"] == (64, 96)
    mtp = {name: shape for name, shape in shapes.items() if name.startswith("mtp.") and "mixer" not in name}
    assert mtp == {
        "mtp.layers.0.eh_proj.weight": (64, 128),
        "mtp.layers.0.enorm.weight": (64,),
        "mtp.layers.0.hnorm.weight": (64,),
        "mtp.layers.0.norm.weight": (64,),
        "mtp.layers.1.norm.weight": (64,),
        "mtp.layers.1.final_layernorm.weight": (64,),
    }
    assert not any(name.endswith((".experts.up_proj", ".experts.down_proj")) for name in shapes)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip(module: Any, tmp_path: Path, sharded: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    model = module.Model().to(dtype)
    module.save_checkpoint(model, tmp_path / "saved")
    if sharded:
        split(tmp_path / "saved")
    with torch.device("meta"):
        copy = module.Model()
    module.load_checkpoint(copy, tmp_path / "saved")
    state = model.state_dict()
    assert copy.state_dict().keys() == state.keys()
    for name, tensor in copy.state_dict().items():
        assert tensor.dtype == torch.float32, name
        assert torch.equal(tensor, state[name].float()), name


def test_shards(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.checkpoint, "MAX_SHARD_BYTES", 100_000)
    model = module.Model()
    module.save_checkpoint(model, tmp_path / "saved")
    files = sorted(path.name for path in (tmp_path / "saved").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    for file in files:
        tensors = load_file(tmp_path / "saved" / file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 100_000 or len(tensors) == 1
        assert all(index["weight_map"][name] == file for name in tensors)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in model.state_dict().values())
    copy = module.Model()
    module.load_checkpoint(copy, tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(copy.state_dict().values(), model.state_dict().values(), strict=True))


def test_all_that_is_wrong_is_named_and_nothing_is_copied(module: Any, saved: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["lm_head.weight"], tensors["mtp.layers.0.enorm.weight"]
        del tensors["backbone.layers.1.mixer.experts.5.up_proj.weight"]
        tensors["backbone.layers.9.norm.weight"] = torch.ones(64)
        tensors["backbone.norm_f.weight"] = torch.ones(63)
        tensors["backbone.embeddings.weight"] = torch.zeros(97, 64, dtype=torch.int8)

    rewrite(saved, change)
    model = module.Model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(module.CheckpointError) as caught:
        module.load_checkpoint(model, saved)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{saved} does not fit the model:"
    assert sorted(line.strip() for line in lines[1:]) == [
        "backbone.embeddings.weight: type I8, expected one of ['BF16', 'F16', 'F32', 'F8_E4M3', 'U8']",
        "backbone.layers.1.mixer.experts.5.up_proj.weight: missing",
        "backbone.layers.9.norm.weight: unexpected",
        "backbone.norm_f.weight: shape [63], expected [64]",
        "lm_head.weight: missing",
        "mtp.layers.0.enorm.weight: missing",
    ]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_thousands_of_equal_faults_are_one_line(module: Any, saved: Path) -> None:
    rename(saved, lambda name: f"text.{name}")
    with pytest.raises(module.CheckpointError) as caught:
        module.load_checkpoint(module.Model(), saved)
    first, *lines = str(caught.value).splitlines()
    assert first.endswith("does not fit the model:")
    assert [line.rpartition(" ")[2] for line in lines] == ["unexpected", "missing"]
    others = len(load_file(saved / "model.safetensors")) - 3
    assert all(f" and {others} more: " in line for line in lines)


@pytest.mark.parametrize(
    ("count", "lines"),
    [(0, []), (1, ["0: gone"]), (3, ["0: gone", "1: gone", "2: gone"]), (4, ["0, 1, 2 and 1 more: gone"])],
)
def test_a_few_faults_have_a_line_each(module: Any, count: int, lines: list[str]) -> None:
    assert module.checkpoint.told_together("gone", [str(n) for n in range(count)]) == lines


def test_a_json_file_may_have_just_so_many_bytes(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.checkpoint, "MAX_JSON_BYTES", 4)
    path = tmp_path / "json"
    path.write_text("1234")
    assert module.checkpoint.read_json(path) == 1234
    path.write_text("12345")
    with pytest.raises(ValueError, match="larger than 4 bytes"):
        module.checkpoint.read_json(path)


def test_a_shard_may_have_just_so_many_bytes(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of 8, 8, 12 and 24 bytes in shards of 16: what just fits goes in, what never fits stands alone."""
    monkeypatch.setattr(module.checkpoint, "MAX_SHARD_BYTES", 16)
    tensors = {name: torch.zeros(size) for name, size in zip("abcd", (2, 2, 3, 6), strict=True)}
    module.checkpoint.write_shards(tmp_path, tensors, iter(tensors.items()))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert index == {
        "metadata": {"total_size": 52},
        "weight_map": {"a": files[0], "b": files[0], "c": files[1], "d": files[2]},
    }
    assert sorted(load_file(tmp_path / files[0])) == ["a", "b"]


def test_a_quantized_weight_has_half_as_many_bytes(module: Any) -> None:
    weight, scalar = torch.zeros(4, 6, 8), torch.zeros(())
    assert module.checkpoint.stored_shape(weight, "U8") == [4, 6, 4]
    assert module.checkpoint.stored_shape(weight, "BF16") == [4, 6, 8]
    assert module.checkpoint.stored_shape(scalar, "F32") == []


@pytest.mark.parametrize("prefix", ["model", "model.backbone", "_orig_mod.module.backbone", "model.language_model"])
def test_names_of_other_programs_are_read(module: Any, saved: Path, tmp_path: Path, prefix: str) -> None:
    expected = load_file(saved / "model.safetensors")

    def renamed(name: str) -> str:
        name = name.replace("backbone.embeddings.", "backbone.embedding.")
        outer = prefix.rpartition(".")[0]
        inside = name.startswith("backbone.")
        return f"{prefix}.{name.partition('.')[2]}" if inside else f"{outer}.{name}" if outer else name

    rename(saved, renamed)
    model = module.Model()
    module.load_checkpoint(model, saved)
    for name, tensor in module.named_tensors(model).items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_permissions_are_those_of_the_umask(module: Any, tmp_path: Path, mask: int) -> None:
    old = os.umask(mask)
    try:
        module.save_checkpoint(module.Model(), tmp_path / "saved")
    finally:
        os.umask(old)
    assert (tmp_path / "saved").stat().st_mode & 0o777 == 0o777 & ~mask
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "saved").iterdir()} == {0o666 & ~mask}
    assert list(tmp_path.iterdir()) == [tmp_path / "saved"]


def test_a_tied_model_is_written_with_its_head(tmp_path: Path) -> None:
    """transformers does not tie: it would make the head up."""
    spec = tiny_spec()
    tied = generate(replace(spec, model=replace(spec.model, tie_word_embeddings=True)))
    model = tied.Model()
    tied.save_checkpoint(model, tmp_path / "saved")
    tensors = load_file(tmp_path / "saved/model.safetensors")
    assert torch.equal(tensors["lm_head.weight"], tensors["backbone.embeddings.weight"])
    again = tied.Model()
    tied.load_checkpoint(again, tmp_path / "saved")
    assert torch.equal(again.backbone.embeddings.weight, model.backbone.embeddings.weight)


def test_mtp_tensors_are_left_unread_where_the_spec_has_no_mtp(module: Any, saved: Path) -> None:
    without = generate(tiny_spec(mtp=None))
    model = without.Model()
    without.load_checkpoint(model, saved)
    expected = load_file(saved / "model.safetensors")["lm_head.weight"]
    assert torch.equal(model.lm_head.weight, expected)


@pytest.mark.parametrize(
    "file", ["../outside.safetensors", "/etc/outside.safetensors", "a/b.safetensors", "a\\b.safetensors", "..", ""]
)
def test_an_index_cannot_name_files_elsewhere(module: Any, saved: Path, file: str) -> None:
    split(saved)
    (saved.parent / "outside.safetensors").write_bytes((saved / "part-0.safetensors").read_bytes())
    index = saved / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = file
    index.write_text(json.dumps(content))
    with pytest.raises(module.CheckpointError, match="names what is no file of its folder"):
        module.load_checkpoint(module.Model(), saved)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": null}}',
        "\x00",
        "[" * 100_000,
    ],
    ids=lambda text: repr(text[:30]),
)
def test_an_index_that_is_none(module: Any, saved: Path, text: str) -> None:
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors.index.json").write_text(text)
    with pytest.raises(module.CheckpointError, match="is not an index"):
        module.load_checkpoint(module.Model(), saved)


def test_an_index_that_never_ends(module: Any, saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with (saved / "model.safetensors.index.json").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(module.CheckpointError, match=r"is not an index.*larger than 67,108,864 bytes"):
        module.load_checkpoint(module.Model(), saved)


def test_files_that_are_missing_or_torn(module: Any, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(module.CheckpointError, match="has neither"):
        module.load_checkpoint(module.Model(), tmp_path / "nowhere")
    whole = (saved / "model.safetensors").read_bytes()
    for data in (b"", whole[:100], whole[:-1]):
        (saved / "model.safetensors").write_bytes(data)
        with pytest.raises(module.CheckpointError, match="cannot be read"):
            module.load_checkpoint(module.Model(), saved)
    (saved / "model.safetensors").write_bytes(whole)
    weight_map = split(saved)
    (saved / weight_map["lm_head.weight"]).unlink()
    with pytest.raises(module.CheckpointError, match="cannot be read"):
        module.load_checkpoint(module.Model(), saved)


def test_a_tensor_in_two_shards(module: Any, saved: Path) -> None:
    file = split(saved)["lm_head.weight"]
    other = next(path for path in sorted(saved.glob("part-*")) if path.name != file)
    save_file(load_file(other) | {"lm_head.weight": torch.zeros(97, 64)}, other)
    with pytest.raises(module.CheckpointError, match=r"lm_head\.weight: stands in both"):
        module.load_checkpoint(module.Model(), saved)


def test_saving_replaces_a_checkpoint_and_nothing_else(module: Any, saved: Path) -> None:
    old = load_file(saved / "model.safetensors")["lm_head.weight"]
    module.save_checkpoint(module.Model(), saved)
    assert not torch.equal(load_file(saved / "model.safetensors")["lm_head.weight"], old)
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(module.CheckpointError, match=r"holds notes\.txt"):
        module.save_checkpoint(module.Model(), saved)
    assert (saved / "notes.txt").read_text() == "mine"
    file = saved.parent / "file"
    file.write_text("mine")
    with pytest.raises(module.CheckpointError, match="not a folder"):
        module.save_checkpoint(module.Model(), file)
    assert sorted(path.name for path in saved.parent.iterdir()) == ["file", "saved"]


def test_saving_from_a_stream_holds_one_shard(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that come one at a time, for a model without memory, are written in its types."""
    torch.manual_seed(6)
    model = module.Model()
    expected = {name: tensor.clone() for name, tensor in module.named_tensors(model).items()}
    monkeypatch.setattr(module.checkpoint, "MAX_SHARD_BYTES", 40_000)
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most
        for name, tensor in expected.items():
            copy = tensor.bfloat16() if tensor.dim() > 1 else tensor.clone()  # so that no cast makes another
            alive.append(weakref.ref(copy))
            most = max(most, sum(held.nbytes for ref in alive if (held := ref()) is not None))
            yield name, copy
            del copy

    with torch.device("meta"):
        without_memory = module.Model().to(torch.bfloat16)
    module.save_checkpoint(without_memory, tmp_path / "saved", stream())
    total = sum(2 * tensor.numel() for tensor in expected.values())
    assert max(2 * tensor.numel() for tensor in expected.values()) < most <= 45_000 < total / 5
    files = sorted((tmp_path / "saved").glob("*.safetensors"))
    got = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert len(files) > 5 and got.keys() == expected.keys()
    for name, tensor in got.items():
        kind = torch.float32 if name.endswith(KEPT_FLOAT32) else torch.bfloat16
        assert tensor.dtype == kind and torch.equal(tensor, expected[name].to(kind))
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_failed_save_leaves_the_old_checkpoint(module: Any, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (saved / "model.safetensors").read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(module.checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        module.save_checkpoint(module.Model(), saved)
    assert (saved / "model.safetensors").read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_the_saved_config_is_that_of_the_spec(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    expected = export_config(tiny_spec())
    assert config.pop("dtype") == "float32"
    assert config.pop("n3c") == {"name": "tiny-test", "time_step_min": 0.001}
    assert config.pop("time_step_min") == 1e-12  # by which transformers would bound dt
    assert config == {name: expected[name] for name in config}
    assert config["mtp_num_layers"] == 2
    imported = run_import(saved).spec
    spec = tiny_spec()
    assert (imported.name, imported.model, imported.mamba, imported.attention) == (
        spec.name,
        spec.model,
        spec.mamba,
        spec.attention,
    )
    assert (imported.moe, imported.mlp, imported.mtp) == (spec.moe, spec.mlp, spec.mtp)
