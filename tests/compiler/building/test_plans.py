"""The engine half of `n3c build`: which graphs and plans there are, what describes them, for which GPUs."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from n3c.backends.onnx.bindings import BYTES, parameter_of
from n3c.backends.trt.module import load_trt
from n3c.backends.trt.plan_file import check_plan, read_sidecar
from n3c.compiler.building.request import require_memory
from n3c.ir.diagnostics import ExitCode, N3CError
from n3c.passes.lower.model import lower
from n3c.passes.serving import serve
from n3c.specs.load import load_spec
from support.command import n3c, write_small
from support.fake_tensorrt_module import install_stand_in
from support.programs import random_tensors, save_tensors
from support.specs import QUANTIZED, SPECS, small_spec

SERVING = ("max_seq_len = 32", "batch_sizes = [1, 2]\nmax_seq_len = 32\nprefill_chunk = 8\ndraft_tokens = 2")
ENTRIES = ["decode", "prefill", "verify", "draft"]


def built(spec: Path, out: Path, *arguments: object) -> tuple[dict[str, Any], set[str]]:
    """Build and return bindings.json and the paths of all files."""
    result = n3c("build", spec, "-o", out, "--json", *arguments)
    assert result.code == 0, result.err
    files = {file["path"] for file in result.data["files"]}
    (bindings,) = (path for path in files if path.endswith("bindings.json"))
    return json.loads((out / bindings).read_text()), files


def test_every_entry_point_at_every_batch_size(tmp_path: Path) -> None:
    spec = write_small(tmp_path, SERVING, extra=QUANTIZED)
    bindings, files = built(spec, tmp_path / "out", "--target", "onnx")
    assert {path for path in files if path.endswith(".onnx")} == {
        *(f"onnx/{entry}.onnx" for entry in ENTRIES),
        *(f"onnx/{entry}.b2.onnx" for entry in ENTRIES if entry != "prefill"),
    }
    names = {"prefill.b1", *(f"{entry}.b{batch}" for entry in ENTRIES if entry != "prefill" for batch in (1, 2))}
    assert set(bindings["entries"]) == names
    assert bindings["entries"]["prefill.b1"]["dynamic"] == {"key_positions": [8, 32, 32]}
    known = {row["name"] for row in bindings["weights"]}
    assert known == {name for entry in bindings["entries"].values() for name in entry["weights"]}


def test_entry_points_share_one_copy_of_the_weights(tmp_path: Path) -> None:
    """Equal `memory` is one buffer; two layouts of one weight would show as more bytes than the model has."""
    spec = write_small(tmp_path, SERVING, extra=QUANTIZED)
    bindings, _ = built(spec, tmp_path / "out", "--target", "onnx")
    bits = {"f32": 32, "bf16": 16, "f8e4m3": 8, "i8": 8, "f4e2m1": 4}
    memories: dict[str, set[int]] = {}
    for row in bindings["weights"]:
        elements = 1
        for dim in row["shape"]:
            elements *= dim
        memories.setdefault(row["memory"], set()).add(elements * bits[row["dtype"]] // 8)
    assert all(len(sizes) == 1 for sizes in memories.values())
    program = serve(load_spec(spec)[0]).program
    assert sum(max(sizes) for sizes in memories.values()) == sum(p.type.bytes for p in program.parameters.values())
    rows = {row["name"]: row for row in bindings["weights"]}
    shared = {name: row for name, row in rows.items() if name.endswith(BYTES)}
    assert shared and all(row["memory"] == rows[parameter_of(name)]["memory"] for name, row in shared.items())


def test_one_entry_point_alone(tmp_path: Path) -> None:
    spec = write_small(tmp_path, SERVING)
    arguments = ("--target", "onnx", "--entry", "draft", "--entry", "prefill")
    _, files = built(spec, tmp_path / "out", *arguments)
    assert {path for path in files if path.endswith(".onnx")} == {
        "onnx/draft.onnx",
        "onnx/draft.b2.onnx",
        "onnx/prefill.onnx",
    }


def test_stages_cut_every_entry_point_at_the_same_layers(tmp_path: Path) -> None:
    spec = write_small(tmp_path, SERVING, extra=QUANTIZED)
    bindings, files = built(spec, tmp_path / "out", "--target", "onnx", "--stages", 2)
    assert {"onnx/decode.s0.onnx", "onnx/decode.b2.s1.onnx", "onnx/prefill.s0.onnx", "onnx/draft.s1.onnx"} <= files
    assert "onnx/draft.s0.onnx" not in files  # all of the drafter is where its weights are
    stages = [
        {name for entry in bindings["entries"].values() if entry["stage"] == stage for name in entry["weights"]}
        for stage in (0, 1)
    ]
    assert stages[0] & stages[1] == {"backbone.embeddings.weight"}  # the drafter embeds tokens too


@pytest.mark.parametrize(("sms", "entry"), [("120", "draft"), ("80,120", "decode")])
def test_a_plan_and_its_sidecar(sms: str, entry: str, tmp_path: Path) -> None:
    spec, out = write_small(tmp_path, SERVING, extra=QUANTIZED), tmp_path / "out"
    arguments = ("--target", "trt", "--entry", entry, "--sm", sms, "--set", "serving.batch_sizes=[2]")
    bindings, files = built(spec, out, *arguments)
    assert {f"onnx/{entry}.onnx", f"trt/{entry}.b2.plan", f"trt/{entry}.b2.plan.json"} <= files
    assert not {row["dtype"] for row in bindings["weights"]} & {"f8e4m3", "f4e2m1"}  # `mtp.*` is BF16
    manifest = json.loads((out / "manifest.json").read_text())
    plan, version, sha256 = out / f"trt/{entry}.b2.plan", load_trt().__version__, manifest["spec"]["sha256"]
    sidecar = check_plan(plan, sm=120, version=version, spec_sha256=sha256)
    assert (sidecar.entry, sidecar.sms) == (f"{entry}.b2", tuple(map(int, sms.split(","))))
    audit = json.loads((out / "trt/audit.json").read_text())
    assert audit["summary"]["mismatches"] == 0
    traffic = audit["traffic"]
    assert 1 < traffic["entries"][f"{entry}.b2"]["ratio"] < 2
    assert traffic["plans"][f"{entry}.b2.plan"]["context"] == 32


def test_a_plan_for_another_gpu_can_be_rebuilt_with_the_command_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = write_small(tmp_path, SERVING)
    built(spec, Path("out"), "--target", "trt", "--entry", "draft")
    plan, version = Path("out/trt/draft.b1.plan"), load_trt().__version__
    with pytest.raises(N3CError) as caught:
        check_plan(plan, sm=86, version=version)
    command = (caught.value.diagnostics[0].help or "").partition("rebuild it: n3c ")[2]
    assert n3c(*command.split(), "--entry", "draft").code == 0
    assert check_plan(plan, sm=86, version=version).sms == (120, 86)


def test_full_tensorrt_goes_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the builder call; the stand-in lists a kernel that reads no weight, so nothing is realised."""
    install_stand_in(tmp_path, monkeypatch)
    spec, out = write_small(tmp_path, SERVING, extra=QUANTIZED), tmp_path / "out"
    arguments = ("--target", "trt", "--trt", "full", "--sm", 90, "--entry", "draft")
    result = n3c("build", spec, "-o", out, "--json", *arguments)
    assert (result.code, set(result.codes)) == (5, {"E0506"})
    assert (out / "trt/draft.b2.plan").read_bytes() == b"engine!"
    sidecar = read_sidecar(out / "trt/draft.b2.plan")
    assert (sidecar.flavour, sidecar.version, sidecar.sms) == ("full", "11.4.0.3", (90,))


def test_embedded_weights(tmp_path: Path) -> None:
    spec, out = write_small(tmp_path, SERVING, extra=QUANTIZED), tmp_path / "out"
    save_tensors(random_tensors(lower(load_spec(spec)[0])), tmp_path / "weights")
    arguments = ("--weights-mode", "embedded", "--weights", tmp_path / "weights", "--entry", "draft")
    bindings, files = built(spec, out, "--target", "trt", *arguments)
    assert bindings["weights_mode"] == "embedded" and "onnx/weights.data" in files
    assert read_sidecar(out / "trt/draft.b1.plan").weights_mode == "embedded"
    assert json.loads((out / "trt/audit.json").read_text())["summary"]["mismatches"] == 0
    sizes = {f["path"]: f["bytes"] for f in json.loads((out / "manifest.json").read_text())["files"]}
    assert sizes["trt/draft.b1.plan"] > sizes["onnx/weights.data"] > 5 * sizes["onnx/draft.onnx"]


def test_a_model_too_large_to_embed() -> None:
    program = serve(small_spec(QUANTIZED)).program
    weights = sum(entry.bytes for entry in program.ledger)
    require_memory(program, 4 * weights, None)
    with pytest.raises(N3CError) as caught:
        require_memory(serve(load_spec(SPECS / "super.toml")[0]).program, 64 * 10**9, None)
    (diagnostic,) = caught.value.diagnostics
    assert (diagnostic.code, caught.value.exit_code) == ("E0513", ExitCode.TARGET)
    assert "3 times 79.0 GB of weights; this machine has 64.0 GB" in diagnostic.message


def forms_of(spec: object, *arguments: object) -> dict[tuple[str, str, str], tuple[str, bool]]:
    rows = n3c("check", spec, "--json", *arguments).data["forms"]
    return {(r["entry"], r["weights"], r["format"]): (r["form"], r["native"]) for r in rows}


def test_check_tells_the_forms(tmp_path: Path) -> None:
    spec = write_small(tmp_path, SERVING, extra=QUANTIZED)
    forms = partial(forms_of, spec)
    blackwell, ada, ampere = (forms("--target", "trt", "--sm", sm) for sm in (120, 89, "80,120"))
    assert blackwell.keys() == ada.keys() == ampere.keys()
    assert all(native for _, native in blackwell.values())
    assert ada["decode", "linears", "fp8"] == ("one kernel from the stored values", True)
    assert ada["decode", "experts", "nvfp4"] == ("one kernel from bytes, FP4 decoded by tables", False)
    assert ampere["decode", "linears", "fp8"] == ("one kernel from bytes, FP8 decoded by tables", False)
    assert ampere["decode", "linears", "bf16"] == ("one kernel from the stored values", True)
    assert ampere["prefill", "experts", "nvfp4"][0].startswith("BF16 matrix product, FP4 and FP8 weights decoded")
    assert blackwell["prefill", "experts", "nvfp4"][0].startswith("FP4 x FP4 matrix product")
    assert forms("--target", "torch") == forms("--target", "onnx") == {}
    table = n3c("check", spec, "--target", "trt", "--sm", "80").out
    assert "prefill" in table and "decoded by tables once a call" in table


def test_forms_of_large_weights_differ_by_what_is_rounded() -> None:
    """Super on Blackwell: products of FP8 for any rows; BF16, which rounds nothing, as sums where drafts are judged."""
    forms = forms_of(SPECS / "super.toml", "--target", "trt")
    sums, product = "one kernel from the stored values", "FP8 x FP8 matrix product"
    assert [forms[entry, "linears", "fp8"][0] for entry in ("decode.b4", "verify", "prefill")] == [product] * 3
    assert [forms[entry, "linears", "bf16"][0] for entry in ("decode.b4", "verify", "draft")] == [sums] * 3
    assert forms["prefill", "linears", "bf16"][0] == "BF16 matrix product"
