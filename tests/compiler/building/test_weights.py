"""`build --weights`: what is wrong with a checkpoint directory is told before anything is written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest

from n3c.ir.source import Stack, tensor_names
from n3c.ir.types import DType
from n3c.passes.lower.model import lower
from n3c.specs.load import load_spec
from support.command import Result, n3c, write_small

Shapes = Mapping[str, tuple[int, ...]]

SMALLER = [
    ('pattern = "MEM*E-ME"', 'pattern = "M*"'),
    ('[mtp]\npattern = "*E"\ndepth = 2\n', ""),
    ("hidden_size = 64", "hidden_size = 32"),
]
"""Changes to the small spec that make its checkpoint a few dozen tensors."""


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    return write_small(tmp_path, *SMALLER)


@pytest.fixture
def shapes(spec: Path) -> dict[str, tuple[int, ...]]:
    """Return the tensors of the checkpoint that fits."""
    found: dict[str, tuple[int, ...]] = {}
    for parameter in lower(load_spec(spec)[0]).parameters.values():
        shape = parameter.type.static_dims[1 if isinstance(parameter.source, Stack) else 0 :]
        found |= dict.fromkeys(tensor_names(parameter.source), shape)
    return found


def save(file: Path, shapes: Shapes, dtype: DType = DType.F32) -> None:
    """Write zeros as a safetensors file, by its format: length of the header, header, data."""
    header: dict[str, object] = {}
    at = 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": dtype.value.upper(), "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(at))


def build(spec: Path, weights: Path) -> Result:
    result = n3c("build", spec, "--target", "torch", "--weights", weights, "-o", spec.parent / "out", "--json")
    assert (result.code == 0) == (spec.parent / "out").exists()
    return result


def test_a_checkpoint_that_fits(spec: Path, shapes: Shapes, tmp_path: Path) -> None:
    save(tmp_path / "one/model.safetensors", shapes)
    assert build(spec, tmp_path / "one").code == 0
    halves = sorted(shapes)[::2], sorted(shapes)[1::2]
    for i, names in enumerate(halves):
        save(tmp_path / f"two/model-{i}.safetensors", {name: shapes[name] for name in names})
    index = {"weight_map": {name: f"model-{i}.safetensors" for i, names in enumerate(halves) for name in names}}
    (tmp_path / "two/model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert build(spec, tmp_path / "two").code == 0


def test_tensors_that_do_not_fit(spec: Path, shapes: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    missing, misshapen = sorted(shapes)[0], sorted(shapes)[1]
    del shapes[missing]
    shapes[misshapen] = (*shapes[misshapen], 3)
    shapes["one.too.many"] = (1,)
    save(tmp_path / "weights/model.safetensors", shapes)
    result = build(spec, tmp_path / "weights")
    assert (result.code, sorted(result.codes)) == (6, ["E0603", "E0606", "E0608"])
    for name in (missing, misshapen, "one.too.many"):
        assert result.err.count(f"`{name}`") == 1
    assert {d["file"] for d in result.data["diagnostics"]} == {str(tmp_path / "weights")}


def test_files_that_are_none(spec: Path, shapes: Shapes, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    assert build(spec, weights).codes == ["E0601"]
    weights.write_text("a file", encoding="utf-8")
    assert build(spec, weights).codes == ["E0601"]
    weights.unlink()
    weights.mkdir()
    assert build(spec, weights).codes == ["E0601"]
    file = weights / "model.safetensors"
    save(file, shapes)
    whole = file.read_bytes()
    damaged = {
        "truncated": whole[:-1],
        "cut in the header": whole[:100],
        "cut in the length": whole[:5],
        "empty": b"",
        "text": b"version https://git-lfs.github.com/spec/v1\n" * 3,
        "absurd length": b"\xff" * 8 + whole[8:],
        "no JSON": whole[:8] + b"x" * (len(whole) - 8),
    }
    for name, content in damaged.items():
        file.write_bytes(content)
        result = build(spec, weights)
        assert (result.code, result.codes) == (6, ["E0609"]), name
        assert result.data["diagnostics"][0]["file"] == str(file)


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        b'{"weight_map": []}',
        b'{"weight_map": {"a": "missing.safetensors"}}',
        b'{"weight_map": {"a": "../outside.safetensors"}}',
        b'{"weight_map": {"a": "/outside.safetensors"}}',
        b'{"weight_map": {"a": "model.bin"}}',
        b'{"weight_map": {"a": 3}}',
        b'{"weight_map": {"a": ["x"]}}',
    ],
)
def test_an_index_that_is_wrong_or_leaves_its_directory(
    index: bytes, spec: Path, shapes: Shapes, tmp_path: Path
) -> None:
    save(tmp_path / "outside.safetensors", shapes)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/model.bin").touch()
    (tmp_path / "weights/model.safetensors.index.json").write_bytes(index)
    result = build(spec, tmp_path / "weights")
    assert (result.code, result.codes) == (6, ["E0604"])


def test_a_shard_that_lacks_what_its_index_promises(spec: Path, shapes: Shapes, tmp_path: Path) -> None:
    lost, *rest = sorted(shapes)
    save(tmp_path / "weights/model-1.safetensors", {name: shapes[name] for name in rest})
    index = {"weight_map": dict.fromkeys(shapes, "model-1.safetensors")}
    (tmp_path / "weights/model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    result = build(spec, tmp_path / "weights")
    assert (result.code, result.codes) == (6, ["E0603"])
    assert f"`{lost}`" in result.err
