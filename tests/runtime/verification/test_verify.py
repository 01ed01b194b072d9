"""`n3c verify`: all implementations agree, and one altered line, node or table is found and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from n3c.backends.hashing import sha256_file
from support.checkpoints import write_checkpoint
from support.command import n3c
from support.specs import QUANTIZED, SMALL, spec_from_text

TEXT = SMALL.replace('"MEM*E-ME"', '"MEM*-"').replace(
    "max_seq_len = 32", "max_seq_len = 40\nprefill_chunk = 8\ndraft_tokens = 2"
) + QUANTIZED.replace('roles = ["moe.shared.up"]\nlayers = "last 4"', 'roles = ["moe.shared.up"]')


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build with ONNX files and PyTorch code."""
    folder = tmp_path_factory.mktemp("verify")
    (folder / "spec.toml").write_text(TEXT.lstrip())
    for target in ("onnx", "torch"):
        assert n3c("build", folder / "spec.toml", "--target", target, "-o", folder / "out").code == 0
    return folder / "out"


@pytest.fixture
def altered(built: Path, tmp_path: Path) -> Callable[[str, Callable[[Path], None]], Path]:
    """Copies the build, changes one file, and makes the manifest agree: a fault of the compiler, not of the disk."""

    def alter(file: str, change: Callable[[Path], None]) -> Path:
        out = tmp_path / "out"
        shutil.copytree(built, out)
        change(out / file)
        manifest = json.loads((out / "manifest.json").read_text())
        (row,) = (row for row in manifest["files"] if row["path"] == file)
        row["bytes"], row["sha256"] = (out / file).stat().st_size, sha256_file(out / file)
        (out / "manifest.json").write_text(json.dumps(manifest))
        return out

    return alter


def compared(out: Path) -> tuple[int, dict[str, Any]]:
    result = n3c("verify", out, "--json")
    return result.code, {row["name"]: row for row in result.data["implementations"]}


def test_all_implementations_of_a_build_agree(built: Path) -> None:
    code, found = compared(built)
    assert code == 0
    assert list(found) == [
        "PyTorch",
        "PyTorch engine, packed",
        "ONNX Runtime, float32",
        "ONNX files, reference evaluator",
    ]
    assert all(row["ok"] for row in found.values())
    for name in ("PyTorch", "PyTorch engine, packed", "ONNX Runtime, float32"):
        assert found[name]["worst"]["relative"] < 1e-5
    assert found["ONNX Runtime, float32"]["tensors"] > found["PyTorch"]["tensors"] > 100
    text = n3c("verify", built, "--seed", 3)
    assert text.code == 0
    for wrong in (-1, 2**63):
        refused = n3c("verify", built, "--seed", wrong, "--json")
        assert (refused.code, refused.codes) == (2, ["E0701"])
    assert "ok: " in text.out and "not compared: TensorRT" in text.out


def test_with_the_weights_of_a_checkpoint(built: Path, tmp_path: Path) -> None:
    """BF16 weights are quantized on the way, the same for every implementation."""
    write_checkpoint(tmp_path / "weights", spec_from_text(TEXT))
    result = n3c("verify", built, "--weights", tmp_path / "weights", "--json")
    assert result.code == 0
    assert result.data["weights"] == str(tmp_path / "weights")


JOINED = "torch.cat([self.enorm(embedding), self.hnorm(x)]"


@pytest.mark.parametrize(
    ("file", "old", "new", "layer"),
    [
        ("model.py", "self.D[:, None]", "-self.D[:, None]", "backbone.layers.0"),
        ("state.py", "<= position[:, None, :, None]", "< position[:, None, :, None]", "backbone.layers.3"),
        ("model.py", JOINED, "torch.cat([self.hnorm(x), self.enorm(embedding)]", "mtp.layers.0"),
    ],
    ids=["skip", "mask", "mtp"],
)
def test_one_line_of_the_module(
    file: str, old: str, new: str, layer: str, altered: Callable[[str, Callable[[Path], None]], Path]
) -> None:
    def change(path: Path) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    code, found = compared(altered(f"torch/small/{file}", change))
    assert code == 5
    assert found["PyTorch"]["first"]["tensor"] == layer
    assert found["ONNX files, reference evaluator"]["ok"]


def test_a_module_that_fails(altered: Callable[[str, Callable[[Path], None]], Path]) -> None:
    def change(path: Path) -> None:
        path.write_text(path.read_text().replace("after = scan(", "after = skan("))

    out = altered("torch/small/model.py", change)
    result = n3c("verify", out, "--json")
    assert (result.code, result.codes, result.data["ok"]) == (5, ["E0821"], False)
    assert "skan" in result.data["diagnostics"][0]["message"]
    shown = n3c("verify", out)
    assert shown.code == 5
    rows = {line.split("  ")[0]: line.split()[-1] for line in shown.out.splitlines()}
    assert (rows["PyTorch"], rows["ONNX Runtime, float32"]) == ("DIFFERS", "ok")
    assert f"FAILED: {out} with random weights (seed 0)" in shown.out
    assert "E0821" in shown.err


def last_add(graph: Any, scope: str) -> Any:
    return [node for node in graph.node if node.name.startswith(f"{scope}/") and node.op_type == "Add"][-1]


@pytest.mark.parametrize("layer", [2, 4])
def test_one_node_of_a_file(layer: int, altered: Callable[[str, Callable[[Path], None]], Path]) -> None:
    def change(path: Path) -> None:
        model = onnx.load(path)
        last_add(model.graph, f"backbone.layers.{layer}").op_type = "Sub"
        onnx.save(model, path)

    code, found = compared(altered("onnx/decode.onnx", change))
    assert code == 5
    first = found["ONNX files, reference evaluator"]["first"]
    assert (first["tensor"], first["step"]) == (f"backbone.layers.{layer}", "decode behind 0 tokens")
    assert found["PyTorch"]["ok"]


def test_a_state_that_is_written_wrongly(altered: Callable[[str, Callable[[Path], None]], Path]) -> None:
    """The layer's own result is right; what it keeps is not. The state is named, in the call that wrote it."""
    state = "backbone.layers.2.ssm_state"

    def change(path: Path) -> None:
        model = onnx.load(path)
        (node,) = (node for node in model.graph.node if f"{state}.next" in node.output)
        node.output[0] = "right"
        make: Any = onnx.helper.make_node
        wrong = make("Mul", ["right", "right"], [f"{state}.next"], name=f"{node.name}.wrong")
        for other in model.graph.node:
            other.input[:] = ["right" if name == f"{state}.next" else name for name in other.input]
        model.graph.node.append(wrong)
        onnx.save(model, path)

    code, found = compared(altered("onnx/verify.onnx", change))
    first = found["ONNX files, reference evaluator"]["first"]
    assert (code, first["tensor"]) == (5, state)
    assert first["step"].startswith("verify behind")


def test_one_entry_of_a_table(altered: Callable[[str, Callable[[Path], None]], Path]) -> None:
    """The table that decodes FP4 codes: the first layer with such weights differs, by less than a rounding does."""

    def change(path: Path) -> None:
        model = onnx.load(path)
        tables = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and t.dims[:1] == [16]]
        assert tables
        for tensor in tables:
            values = numpy_helper.to_array(tensor).copy()
            values[values == 1.5] = 1.75
            tensor.raw_data = np.ascontiguousarray(values).tobytes()
        onnx.save(model, path)

    result = n3c("verify", altered("onnx/decode.onnx", change), "--json")
    assert (result.code, result.codes) == (5, ["E0820"])
    (diagnostic,) = result.data["diagnostics"]
    assert "`backbone.layers.1`" in diagnostic["message"]
    assert diagnostic["file"].endswith("spec.toml") and diagnostic["line"] > 1


def test_files_that_are_not_those_of_the_manifest(built: Path, tmp_path: Path) -> None:
    for kind, expected in (("cut", "bytes instead of"), ("altered", "another SHA-256"), ("gone", "no such file")):
        out = tmp_path / kind
        shutil.copytree(built, out)
        file = out / "onnx" / "decode.onnx"
        whole = file.read_bytes()
        file.unlink()
        if kind != "gone":
            file.write_bytes(whole[:-1] + (b"#" if kind == "altered" else b""))
        result = n3c("verify", out, "--json")
        assert (result.code, result.codes) == (6, ["E0640"])
        assert expected in result.data["diagnostics"][0]["message"]
        assert result.data["diagnostics"][0]["file"].endswith("decode.onnx")


def test_a_manifest_that_is_cut_off_or_altered(built: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(built, out)
    whole = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text(whole[: len(whole) // 2])
    assert n3c("verify", out, "--json").codes == ["E0614"]
    for key in ("state_plan", "spec"):
        manifest = json.loads(whole)
        if key == "spec":
            manifest["spec"]["sha256"] = "0" * 64
        else:
            manifest["state_plan"]["states"][0]["offset"] += 256
        (out / "manifest.json").write_text(json.dumps(manifest))
        result = n3c("verify", out, "--json")
        assert (result.code, result.codes) == (6, ["E0807"])
    manifest = json.loads(whole)
    manifest["files"][0]["path"] = "../secret"
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert n3c("verify", out, "--json").codes == ["E0640"]
    assert n3c("verify", tmp_path / "nothing", "--json").codes == ["E0601"]


def test_a_build_with_its_weights_inside(tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_text(TEXT.lstrip())
    write_checkpoint(tmp_path / "weights", spec_from_text(TEXT))
    options = ("--entry", "decode", "--weights-mode", "embedded", "--weights", tmp_path / "weights")
    out = ("-o", tmp_path / "out")
    assert n3c("build", tmp_path / "spec.toml", "--target", "onnx", *options, *out).code == 0
    without = n3c("verify", tmp_path / "out", "--json")
    assert (without.code, without.codes) == (2, ["E0808"])
    assert n3c("verify", tmp_path / "out", "--weights", tmp_path / "weights").code == 0


def test_a_model_that_is_too_large_says_what_to_do(tmp_path: Path) -> None:
    path = Path(__file__).parents[3] / "specs" / "nano-4b.toml"
    assert n3c("build", path, "--target", "torch", "-o", tmp_path / "out").code == 0
    result = n3c("verify", tmp_path / "out", "--json")
    assert (result.code, result.codes) == (4, ["E0822"])
    assert "--set" in result.data["diagnostics"][0]["help"]
