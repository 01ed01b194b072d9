"""The same input gives the same build: byte for byte in every process, and `repro` notices what does not."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from n3c.backends.trt.plan_comparison import same_but_for_order
from n3c.compiler import build, repro
from n3c.ir.diagnostics import ExitCode, N3CError
from n3c.specs.load import load_spec
from support.checkpoints import write_checkpoint
from support.command import n3c, n3c_program, tree, write_small


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a build for torch and onnx."""
    folder = tmp_path_factory.mktemp("made")
    for target in ("torch", "onnx"):
        build(write_small(folder), target=target, output=folder / "out")
    return folder / "out"


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """Return a copy of that build, for a test to change."""
    return shutil.copytree(made, tmp_path / "out")


def changed(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest of a build."""
    manifest = json.loads((out / "manifest.json").read_text())
    change(manifest)
    (out / "manifest.json").write_text(json.dumps(manifest))


def replaced(out: Path, path: str, content: bytes) -> None:
    """Change a file of a build, and what the manifest says of it, as if n3c had built it so."""
    (out / path).write_bytes(content)

    def change(manifest: dict[str, Any]) -> None:
        row = next(row for row in manifest["files"] if row["path"] == path)
        row |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    changed(out, change)


def test_processes_folders_and_times_leave_no_trace(tmp_path: Path) -> None:
    trees: list[dict[str, bytes]] = []
    for seed, threads in (("1", "1"), ("22", "2")):
        folder = tmp_path / f"seed {seed}"
        folder.mkdir()
        spec = write_small(folder)
        for target in ("torch", "onnx"):
            command = ("build", spec, "--target", target, "-o", folder / "out")
            environment = {"SOURCE_DATE_EPOCH": "0", "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads}
            assert n3c_program(*command, before=None, **environment).code == 0
        trees.append(tree(folder / "out"))
    assert trees[0] == trees[1]


def test_a_build_is_the_same_again(made: Path) -> None:
    reproduced = repro(made)
    assert reproduced.ok and reproduced.diagnostics == ()
    assert {file.verdict for file in reproduced.files} == {"equal"}
    assert {file.path for file in reproduced.files} == set(tree(made))


def test_options_are_recorded_and_used(tmp_path: Path) -> None:
    spec = write_small(tmp_path)
    out = tmp_path / "out"
    build(spec, target="onnx", entry=["decode"], stages=2, output=out)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["builds"] == {"onnx": {"entry": ["decode"], "stages": 2, "weights_mode": "bound"}}
    assert repro(out).ok
    changed(out, lambda manifest: manifest["builds"]["onnx"].update(stages=3))
    verdicts = {file.path: file.verdict for file in repro(out).files}
    assert verdicts["onnx/decode.s2.onnx"] == "unexpected"
    assert verdicts["onnx/bindings.json"] == "different"
    changed(out, lambda manifest: manifest["builds"]["onnx"].update(stages=1))
    assert {file.path: file.verdict for file in repro(out).files}["onnx/decode.s1.onnx"] == "missing"


def test_a_file_that_differs_is_named_with_its_place(out: Path) -> None:
    good = (out / "torch/train.py").read_bytes()
    replaced(out, "torch/train.py", good[:1000] + b"#" + good[1001:])
    replaced(out, "torch/config.json", b"{}")
    result = n3c("repro", out, "--json")
    assert (result.code, result.codes) == (5, ["E0830", "E0830"])
    assert result.data["ok"] is False
    found = {file["path"]: file for file in result.data["files"] if file["verdict"] != "equal"}
    assert set(found) == {"torch/train.py", "torch/config.json"}
    assert found["torch/train.py"]["detail"] == "from byte 1,000 on"
    assert found["torch/config.json"]["detail"].startswith("2 bytes, again ")
    assert result.data["diagnostics"][1]["file"] == str(out / "torch/train.py")
    shown = n3c("repro", out)
    assert (shown.code, "FAILED" in shown.out, "torch/train.py" in shown.out) == (5, True, True)


def test_a_manifest_that_differs(out: Path) -> None:
    changed(out, lambda manifest: manifest["passes"][0].update(changed=not manifest["passes"][0]["changed"]))
    last = repro(out).files[-1]
    assert (last.path, last.verdict, last.detail) == ("manifest.json", "different", "in passes")


def test_times_are_no_difference(out: Path) -> None:
    changed(out, lambda manifest: [row.update(seconds=100.0) for row in manifest["passes"]])
    assert repro(out).ok


def test_other_versions_are_named(out: Path) -> None:
    changed(out, lambda manifest: manifest["tools"].update(onnx="0.1", another="2"))
    reproduced = repro(out)
    assert reproduced.ok
    assert [found.code for found in reproduced.diagnostics] == ["W0832"]
    assert "another 2, now none; onnx 0.1, now " in reproduced.diagnostics[0].message


def test_a_file_that_was_altered_is_no_build(out: Path) -> None:
    (out / "torch/train.py").write_text("")
    assert n3c("repro", out, "--json").codes == ["E0640"]


GRAPHS = {"entry": [], "stages": 1, "weights_mode": "bound"}
PLANS = {"trt": "rtx", "sm": [120], **GRAPHS}


@pytest.mark.parametrize(
    "builds",
    [
        None,
        {},
        {"jax": {}},
        {"torch": None},
        {"torch": {"stages": 1}},
        {"onnx": {}},
        {"onnx": GRAPHS | {"entry": ["train"]}},
        {"onnx": GRAPHS | {"entry": "decode"}},
        {"onnx": GRAPHS | {"entry": [[]]}},
        {"onnx": GRAPHS | {"stages": 0}},
        {"onnx": GRAPHS | {"stages": 65}},
        {"onnx": GRAPHS | {"stages": True}},
        {"onnx": GRAPHS | {"weights_mode": "inside"}},
        {"onnx": GRAPHS | {"output": "/tmp"}},
        {"trt": GRAPHS},
        {"trt": PLANS | {"trt": "other"}},
        {"trt": PLANS | {"sm": []}},
        {"trt": PLANS | {"sm": ["120"]}},
        {"trt": PLANS | {"sm": [120, 120]}},
        {"trt": PLANS | {"sm": [1 << 40]}},
        {"trt": PLANS | {"sm": 120}},
    ],
)
def test_a_record_that_is_none(builds: object, out: Path) -> None:
    changed(out, lambda manifest: manifest.pop("builds") if builds is None else manifest.update(builds=builds))
    with pytest.raises(N3CError, match="E0831") as caught:
        repro(out)
    assert caught.value.exit_code == 6
    assert caught.value.diagnostics[0].span is not None


def test_weights_inside_are_asked_for_and_compared(tmp_path: Path) -> None:
    path = write_small(tmp_path)
    spec, out = load_spec(path)[0], tmp_path / "out"
    tensors = write_checkpoint(tmp_path / "weights", spec)
    name = "backbone.layers.0.norm.weight"
    write_checkpoint(tmp_path / "others", spec, tensors=tensors | {name: tensors[name] + 1})
    build(path, target="onnx", weights=tmp_path / "weights", weights_mode="embedded", entry=["decode"], output=out)
    refused = n3c("repro", out, "--json")
    assert (refused.code, refused.codes) == (2, ["E0701"])
    assert repro(out, tmp_path / "weights").ok
    different = [file.path for file in repro(out, tmp_path / "others").files if not file.ok]
    assert different == ["onnx/weights.data"]


def test_weights_have_no_effect_on_other_builds(made: Path) -> None:
    refused = n3c("repro", made, "--weights", made, "--json")
    assert (refused.code, refused.codes) == (2, ["E0701"])


def test_plans_are_the_same_but_for_the_order_of_their_records(tmp_path: Path) -> None:
    records = [f"backbone.layers.{i}.mixer.weight".encode().ljust(40, b"\0") + bytes([128 + i] * 60) for i in range(50)]
    plan, other = tmp_path / "a.plan", tmp_path / "b.plan"
    plan.write_bytes(b"".join(records))
    random.Random(1).shuffle(records)
    other.write_bytes(b"".join(records))
    assert plan.read_bytes() != other.read_bytes()
    assert same_but_for_order(plan, other)
    content = other.read_bytes()
    for wrong in (
        content + b"\0",
        content[:-1] + bytes([content[-1] ^ 1]),  # another byte
        content.replace(b"layers.7.mixer", b"mixer.7.layers"),  # the same bytes, another name
    ):
        other.write_bytes(wrong)
        assert not same_but_for_order(plan, other)


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="needs TensorRT-RTX")
def test_plans_are_built_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(write_small(tmp_path), target="trt", entry=["decode"], sm=(86, 120), output=out)
    reproduced = repro(out)
    assert reproduced.ok, reproduced.as_json()
    assert {file.path for file in reproduced.files if file.verdict == "reordered"} <= {
        name for name in tree(out) if ".plan" in name
    }
    plan = next(path for path in (out / "trt").glob("*.plan"))
    content = bytearray(plan.read_bytes())
    content[len(content) // 2] ^= 0xFF
    sidecar = json.loads((out / f"trt/{plan.name}.json").read_text())
    replaced(out, f"trt/{plan.name}", bytes(content))
    replaced(out, f"trt/{plan.name}.json", json.dumps(sidecar | {"sha256": "0" * 64}, indent=1).encode())
    different = [file.path for file in repro(out).files if not file.ok]
    assert different == [f"trt/{plan.name}", f"trt/{plan.name}.json"]
    replaced(out, f"trt/{plan.name}.json", b"[]")
    with pytest.raises(N3CError) as caught:
        repro(out)
    assert (caught.value.exit_code, caught.value.diagnostics[0].code) == (ExitCode.FILE, "E0641")
