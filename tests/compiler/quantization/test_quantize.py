"""n3c quantize: what it writes, and that killing, resuming and splitting it change no byte."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from n3c.backends.safetensors import nvfp4
from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.backends.safetensors.checkpoint_fit import fitting_checkpoint
from n3c.backends.safetensors.packing import fp8_scale, largest, pack_fp8_rows, pack_nvfp4
from n3c.specs.convert import run_import
from support.checkpoints import policy_spec, write_checkpoint
from support.command import PROGRAM, n3c, tree

Q, K, V = (f"backbone.layers.3.mixer.{name}_proj.weight" for name in "qkv")
EXPERT = "backbone.layers.1.mixer.experts.5.up_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    write_checkpoint(folder, policy_spec())
    return folder


@pytest.fixture(scope="module")
def whole(source: Path) -> Path:
    """Return the result of one run, in shards of 30 kB."""
    out = source.parent / "whole"
    assert quantize(source, out).returncode == 0
    return out


def quantize(source: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command(source, out), *more], capture_output=True, text=True, timeout=300, check=False)


def command(source: Path, out: Path) -> list[str]:
    return [
        *PROGRAM,
        "quantize",
        "--fmt",
        "nvfp4",
        "--weights",
        str(source),
        "-o",
        str(out),
        "--max-shard-size",
        "30kb",
    ]


def test_every_tensor_is_what_the_rules_say(source: Path, whole: Path) -> None:
    before, after = Checkpoint(source), Checkpoint(whole)
    rules = {
        EXPERT: 16,
        "backbone.layers.1.mixer.fc1_latent_proj.weight": 1,
        "backbone.layers.0.mixer.in_proj.weight": 1,
        "backbone.layers.5.mixer.up_proj.weight": 16,
    }
    for name, block_rows in rules.items():
        weight = before.read(name)
        matrix = pack_nvfp4(weight, block_rows)
        np.testing.assert_array_equal(after.read(name), matrix.codes)
        np.testing.assert_array_equal(after.read(f"{name}_scale").view(np.uint8), matrix.scale.view(np.uint8))
        assert after.read(f"{name}_scale_2") == matrix.scale_2
    name = "backbone.layers.0.mixer.out_proj.weight"
    scale = fp8_scale(largest(before.read(name)))
    assert after.read(f"{name}_scale") == scale
    np.testing.assert_array_equal(after.read(name).view(np.uint8), pack_fp8_rows(before.read(name), scale).codes)
    for name in ("lm_head.weight", "backbone.layers.0.mixer.A_log", "mtp.layers.1.mixer.experts.0.up_proj.weight"):
        np.testing.assert_array_equal(after.read(name).view(np.uint8), before.read(name).view(np.uint8))


def test_merged_projections_share_a_scale(source: Path, whole: Path) -> None:
    """Readers merge q, k and v into one linear and keep one scale; ModelOpt's export shares it as well."""
    before, after = Checkpoint(source), Checkpoint(whole)
    most = max(np.abs(before.read(name).astype(np.float32)).max() for name in (Q, K, V))
    for name in (Q, K, V):
        assert after.read(f"{name}_scale_2") == np.float32(most / np.float32(2688))


def test_shards_index_and_side_files(source: Path, whole: Path) -> None:
    index = json.loads((whole / "model.safetensors.index.json").read_text())
    shards = sorted(whole.glob("*.safetensors"))
    assert len(shards) > 5
    assert {path.name for path in shards} == set(index["weight_map"].values())
    assert all(path.stat().st_size <= 30_000 for path in shards)
    assert index["metadata"]["total_size"] == sum(Checkpoint(whole).bytes(name) for name in Checkpoint(whole))
    for name in ("tokenizer.json", "generation_config.json"):
        assert (whole / name).read_bytes() == (source / name).read_bytes()
    fitting_checkpoint(run_import(whole).spec, whole)
    assert all(load_file(path) for path in shards)  # the format's own library opens them


def test_the_ledger_tells_rule_format_and_noise(whole: Path) -> None:
    lines = {line["name"]: line for line in json.loads((whole / "n3c_ledger.json").read_text())["weights"]}
    expert = lines[EXPERT]
    assert expert["format"] == "w4a16_nvfp4"
    assert expert["rule"] == "quantization.format"
    assert expert["block"] == [16, 16]
    assert 15 < expert["sqnr_db"] < expert["sqnr_db_1x16"] < 25
    assert lines["backbone.layers.0.mixer.out_proj.weight"]["rule"] == "quantization.rules.1"
    assert lines["lm_head.weight"]["format"] == "bf16"
    assert set(lines) == {name for name in Checkpoint(whole) if not name.endswith(("_scale", "_scale_2"))}


@pytest.mark.parametrize("search", ["none", "mse"])
@pytest.mark.parametrize("block", ["1x16", "16x16"])
def test_the_noise_of_the_ledger_is_that_of_the_result(source: Path, tmp_path: Path, block: str, search: str) -> None:
    arguments = ("--fmt", "nvfp4", "--weights", source, "-o", tmp_path / "out", "--block", block, "--search", search)
    divides = 'quantization.rules.2.roles=["moe.latent_*"]'  # in_proj has 296 rows
    result = n3c("quantize", *arguments, "--json", "--set", divides)
    assert result.code == 0, result.err
    line = next(
        entry
        for entry in json.loads((tmp_path / "out/n3c_ledger.json").read_text())["weights"]
        if entry["name"] == EXPERT
    )
    after, weight = Checkpoint(tmp_path / "out"), Checkpoint(source).read(EXPERT).astype(np.float64)
    matrix = nvfp4.Nvfp4Matrix(
        after.read(EXPERT).view(np.uint8), after.read(f"{EXPERT}_scale"), np.float32(after.read(f"{EXPERT}_scale_2"))
    )
    error = nvfp4.dequantize(matrix) - weight
    assert line["sqnr_db"] == pytest.approx(10 * np.log10((weight**2).sum() / (error**2).sum()), abs=2e-3)
    assert {"role": "moe.experts.up", "format": "w4a16_nvfp4"}.items() <= next(
        entry for entry in result.data["relative_error"] if entry["role"] == "moe.experts.up"
    ).items()


@pytest.mark.parametrize("wanted", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_change_no_byte(wanted: int, source: Path, whole: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments, each time the run is resumed."""
    rng = random.Random(wanted)
    out = tmp_path / "out"
    kills = 0
    seconds = 1.0
    while kills < wanted:
        process = subprocess.Popen(
            [*command(source, out), "--resume"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        process.stderr.readline()  # the first phase: Python has started
        start = time.monotonic()
        try:
            process.wait(timeout=rng.uniform(0.1, 1) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        error = process.communicate()[1]
        if process.returncode == -signal.SIGKILL:
            kills += 1
            assert not out.exists() or tree(out) == tree(whole)
        else:
            assert process.returncode == 0, error
            seconds = min(seconds, time.monotonic() - start)
            assert tree(out) == tree(whole)
            subprocess.run(["rm", "-r", out], check=True)
    assert quantize(source, out, "--resume").returncode == 0
    assert tree(out) == tree(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_parts_join_to_the_same_bytes(source: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    runs = [
        subprocess.Popen([*command(source, out), "--part", f"{i}/3"], stdout=subprocess.PIPE, text=True) for i in (1, 3)
    ]
    for process in runs:
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 0
        assert "--resume" in said
        assert not out.exists()
    again = quantize(source, out, "--part", "3/3")
    assert (again.returncode, "E0617" in again.stderr) == (6, True)
    joined = quantize(source, out, "--resume")  # makes what part 2 would have made, and joins
    assert joined.returncode == 0
    assert tree(out) == tree(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_of_two_whole_runs_one_makes_the_output(source: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    runs = [subprocess.Popen(command(source, out), stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [(process.communicate(timeout=300)[1], process.returncode) for process in runs]
    assert sorted(code for _, code in said) == [0, 6]
    refused = next(text for text, code in said if code == 6)
    assert "E0617" in refused or "E0611" in refused  # still at work, or done already
    assert tree(out) == tree(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_finished_run_may_be_resumed(source: Path, whole: Path) -> None:
    before = tree(whole)
    result = quantize(source, whole, "--resume")
    assert result.returncode == 0
    assert tree(whole) == before


def test_an_interrupted_run_is_not_taken_over_by_another(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert quantize(source, out, "--part", "1/2").returncode == 0
    for more, told in (((), "add --resume"), (("--resume", "--search", "mse"), "had another checkpoint")):
        refused = quantize(source, out, *more)
        assert refused.returncode == 6
        assert "E0617" in refused.stderr
        assert told in refused.stderr
    assert quantize(source, out, "--resume").returncode == 0


def test_a_spec_may_be_given(source: Path, tmp_path: Path) -> None:
    spec = tmp_path / "spec.toml"
    assert n3c("import", source, "-o", spec).code == 0
    result = n3c("quantize", spec, "--weights", source, "-o", tmp_path / "out", "--set", "quantization.format=fp8")
    assert result.code == 0, result.err
    assert Checkpoint(tmp_path / "out").info(EXPERT)[0] == "F8_E4M3"
    assert "W0621" in result.err
