"""Reading checkpoints: what fits, what is refused, and what sources make of tensors."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from n3c.backends.safetensors import nvfp4
from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.backends.safetensors.checkpoint_fit import fitting_checkpoint
from n3c.backends.safetensors.sources import load
from n3c.ir.diagnostics import ExitCode, N3CError
from n3c.ir.program import Parameter
from n3c.ir.source import Bytes, CacheScale, Concat, NegExp, Nvfp4, Stack, Tensor
from n3c.ir.types import DType, TensorType
from n3c.passes.lower.model import lower
from n3c.passes.serving import serve
from support.programs import random_tensors, save_tensors
from support.specs import QUANTIZED, small_spec


def refused(action: object, *texts: str) -> None:
    assert callable(action)
    with pytest.raises(N3CError) as caught:
        action()
    assert caught.value.exit_code == ExitCode.FILE
    for text in texts:
        assert text in str(caught.value)


def test_types_survive(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 4).bfloat16(),
        "f": torch.randn(3, 4),
        "q": torch.randn(3, 4).to(torch.float8_e4m3fn),
        "u": torch.arange(6, dtype=torch.uint8),
        "s": torch.tensor(2.5),
    }
    checkpoint = save_tensors(tensors, tmp_path)
    assert set(checkpoint) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(checkpoint.read(name).astype(np.float32), tensor.float().numpy())
    assert checkpoint.read("b").dtype == ml_dtypes.bfloat16
    assert checkpoint.info("q") == ("F8_E4M3", (3, 4))
    assert checkpoint.read("s").shape == ()


def test_shards(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(2)}, tmp_path / "model-00002-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = Checkpoint(tmp_path)
    assert len(checkpoint.files()) == 2
    assert checkpoint.read("b").sum() == 0


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "model.bin", ".."])
def test_an_index_cannot_leave_its_directory(tmp_path: Path, shard: str) -> None:
    save_file({"a": torch.ones(2)}, tmp_path.parent / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    refused(lambda: Checkpoint(tmp_path), "E0604", "not a file of this directory")


def test_unreadable_checkpoints(tmp_path: Path) -> None:
    refused(lambda: Checkpoint(tmp_path / "nowhere"), "not a directory")
    refused(lambda: Checkpoint(tmp_path), "neither")
    index = tmp_path / "model.safetensors.index.json"
    for text in ("", "[]", '{"weight_map": 3}', "{"):
        index.write_text(text)
        refused(lambda: Checkpoint(tmp_path), "E0604")
    index.write_text('{"weight_map": {"a": "gone.safetensors"}}')
    refused(lambda: Checkpoint(tmp_path), "missing")
    index.unlink()
    save_file({"a": torch.ones(64)}, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    for broken in (data[:-8], data[:4], b"\xff" * 64, data + b"x"):
        (tmp_path / "model.safetensors").write_bytes(broken)
        refused(lambda: Checkpoint(tmp_path), "E0609")


def test_sources(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"e.{i}.w": torch.randn(16, 32, generator=generator) for i in range(3)}
    checkpoint = save_tensors(tensors | {"log": torch.tensor([0.0, 1.0])}, tmp_path)

    def value(source: object, dtype: DType, *dims: int) -> np.ndarray:
        return load(Parameter("p", TensorType(dtype, dims), "norm", source), checkpoint)  # type: ignore[arg-type]

    stacked = value(Stack("e.*.w", 3), DType.F32, 3, 16, 32)
    np.testing.assert_array_equal(stacked[2], tensors["e.2.w"].numpy())
    joined = value(Concat((Tensor("e.0.w"), Tensor("e.1.w"))), DType.F32, 32, 32)
    np.testing.assert_array_equal(joined[16:], tensors["e.1.w"].numpy())
    np.testing.assert_allclose(value(NegExp(Tensor("log")), DType.F32, 2), [-1, -np.e], rtol=1e-6)
    assert value(CacheScale("nobody.k_scale"), DType.F32) == 1
    codes = value(Nvfp4(Stack("e.*.w", 3), "codes", 1), DType.F4E2M1, 3, 16, 32)
    assert codes.shape == (3, 16, 16)
    as_bytes = value(Bytes(Nvfp4(Stack("e.*.w", 3), "codes", 1)), DType.I8, 3, 16, 16)
    np.testing.assert_array_equal(as_bytes.view(np.uint8), codes)
    blocks = value(Bytes(Nvfp4(Stack("e.*.w", 3), "codes", 1)), DType.I8, 3, 16, 2, 8)
    assert blocks.tobytes() == codes.tobytes()
    scales = value(Nvfp4(Stack("e.*.w", 3), "scale_2", 1), DType.F32, 3)
    np.testing.assert_array_equal(scales, [t.abs().max().item() / np.float32(2688) for t in tensors.values()])
    refused(lambda: value(Tensor("log"), DType.F32, 3), "E0606", "needs [3]", "gives [2]")
    refused(lambda: value(Tensor("gone"), DType.F32, 3), "E0603", "gone")


def test_a_quantized_checkpoint_is_read_as_it_is(tmp_path: Path) -> None:
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    matrix = nvfp4.quantize(weight.numpy(), 1)
    stored = {
        "w": torch.from_numpy(matrix.codes),
        "w_scale": torch.from_numpy(matrix.scale.view(np.uint8)).view(torch.float8_e4m3fn),
        "w_scale_2": torch.tensor(7.0),  # not what quantizing again would give
    }
    checkpoint = save_tensors(stored, tmp_path)
    types = {"codes": (DType.F4E2M1, (16, 32)), "scale": (DType.F8E4M3, (16, 2)), "scale_2": (DType.F32, ())}
    for part, (dtype, dims) in types.items():
        parameter = Parameter("w", TensorType(dtype, dims), "lm_head", Nvfp4(Tensor("w"), part, 16))
        found = load(parameter, checkpoint)
        expected = checkpoint.read("w" if part == "codes" else f"w_{part}")
        np.testing.assert_array_equal(found.astype(np.float32), expected.astype(np.float32))


def test_fit_lists_all_that_is_wrong(tmp_path: Path) -> None:
    spec = small_spec()
    tensors = random_tensors(lower(spec))
    save_tensors(tensors, tmp_path / "good")
    fitting_checkpoint(spec, tmp_path / "good")
    del tensors["lm_head.weight"]
    tensors["backbone.norm_f.weight"] = torch.zeros(3)
    tensors["surprise"] = torch.zeros(3)
    save_tensors(tensors, tmp_path / "bad")
    refused(
        lambda: fitting_checkpoint(spec, tmp_path / "bad"),
        "no tensor `lm_head.weight`",
        "`backbone.norm_f.weight` is [3], the spec needs [64]",
        "no place for tensor `surprise`",
    )


def test_an_mtp_block_that_the_spec_leaves_out_is_no_fault(tmp_path: Path) -> None:
    save_tensors(random_tensors(lower(small_spec())), tmp_path)
    fitting_checkpoint(small_spec(odd=('[mtp]\npattern = "*E"\ndepth = 2\n', "")), tmp_path)


def test_not_finite_weights_are_named(tmp_path: Path) -> None:
    spec = small_spec(QUANTIZED)
    tensors = random_tensors(lower(spec))
    tensors["backbone.layers.1.mixer.experts.3.up_proj.weight"][2, 5] = float("nan")
    checkpoint = save_tensors(tensors, tmp_path)
    parameter = serve(spec).program.parameters["backbone.layers.1.mixer.experts.*.up_proj.weight"]
    refused(lambda: load(parameter, checkpoint), "experts.3.up_proj.weight", "NaN or infinity")
