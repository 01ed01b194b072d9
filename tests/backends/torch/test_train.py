"""The generated train.py, as its users run it: learning, stopping, going on, two processes."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from n3c.backends.torch.loading import load_package
from n3c.specs.blocks import Attention, Mamba, MoeLayers

from .generated import imported, tiny_spec, write_generated

TEXT = b"".join(b"the %d quick brown foxes jump over the %d lazy dogs; " % (n % 7, n % 5) for n in range(400))
COMMON = [
    *("--steps", "40", "--batch-size", "4", "--seq-len", "32", "--lr", "0.01", "--save-every", "10"),
    *("--val-every", "20", "--val-sequences", "7", "--val-fraction", "0.1"),
]
SPEED = {"tokens_per_second", "flops_per_second"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the package, train.py and a text; the MoE block of the trunk differs from that of MTP."""
    folder = tmp_path_factory.mktemp("train")
    spec = tiny_spec("ME*", layers=(MoeLayers("1", top_k=2, intermediate_size=32),))
    write_generated(replace(spec, model=replace(spec.model, vocab_size=256)), folder)
    (folder / "text").write_bytes(TEXT)
    return folder


def arguments(folder: Path, out: Path, *options: str) -> list[str]:
    return ["--data", str(folder / "text"), "--out", str(out), *COMMON, *options]


def start(folder: Path, out: Path, *options: str, processes: int = 1) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(folder / "train.py")]
    command += arguments(folder, out, *options)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment)


def run(folder: Path, out: Path, *options: str, processes: int = 1) -> str:
    """Train to the end and return what was printed. One process is this one: it starts at once."""
    if processes == 1:
        printed_here = io.StringIO()
        with imported(folder) as program, contextlib.redirect_stderr(printed_here):
            code = program.train.main(arguments(folder, out, *options))
        assert code == 0, printed_here.getvalue()
        return printed_here.getvalue()
    process = start(folder, out, *options, processes=processes)
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    return printed


def stop_after(process: subprocess.Popen[str], out: Path, step: int, number: int, saved: str = "") -> int:
    """Send a signal when `step` was done, and the checkpoint `saved` written if one is named; return the exit code."""
    deadline = time.monotonic() + 60
    while not any(line["step"] >= step for line in metrics(out)) or (saved and saved not in checkpoints(out)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate(timeout=60)
    return process.returncode


def metrics(out: Path) -> list[dict[str, Any]]:
    path = out / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def without_speed(out: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name not in SPEED} for line in metrics(out)]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "export" / "model.safetensors")


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """Return the output of a run without interruption."""
    run(folder, folder / "whole")
    return folder / "whole"


def test_loss_falls(whole: Path) -> None:
    lines = metrics(whole)
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert lines[0]["loss"] == pytest.approx(math.log(256), abs=1.5)
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"] and lines[-1]["mtp_loss"] < 0.6 * lines[0]["mtp_loss"]
    assert all(len(line["expert_load"]) == 2 and min(line["expert_load"]) >= 1 for line in lines)
    rate = lines[5]["tokens_per_second"]  # FLOPs: 3 times (1000 + 10 times the mean context of 16.5)
    assert lines[5]["flops_per_second"] == pytest.approx(3 * 1165 * rate, rel=1e-3)
    assert checkpoints(whole) == ["step-000000030", "step-000000040"]


def test_schedule(whole: Path) -> None:
    """Warm-up is 2 % of 40 steps, so none; the last 20 % fall by the square root to a hundredth."""
    rates = [line["lr"] for line in metrics(whole)]
    assert rates[:32] == [0.01] * 32
    expected = [0.01 - 0.0099 * math.sqrt(n / 8) for n in range(1, 9)]
    assert rates[32:] == pytest.approx(expected)


def test_validation_by_the_exported_weights(folder: Path, whole: Path) -> None:
    """Bits a byte, as one computes them from the export and the end of the text."""
    module = load_package(folder)
    model = module.Model().eval()
    module.load_checkpoint(model, whole / "export")
    held_out = len(TEXT) // 10 // 32
    count = min(7, held_out)
    tail = torch.tensor(list(TEXT[len(TEXT) - held_out * 32 :])).view(held_out, 32)
    rows = tail[[n * held_out // count for n in range(count)]]
    with torch.no_grad():
        out = model(rows)
    loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    ahead = [
        F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, k + 1 :].flatten())
        for k, logits in enumerate(out.mtp_logits, start=1)
    ]
    last = metrics(whole)[-1]
    assert last["val_mtp_loss"] == pytest.approx(torch.stack(ahead).mean().item(), rel=1e-5)
    assert last["val_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert last["val_bits_per_byte"] == pytest.approx(loss.item() / math.log(2), rel=1e-5)


def test_terminated_and_killed_runs_go_on_to_the_same_bits(folder: Path, whole: Path) -> None:
    out = folder / "interrupted"
    assert stop_after(start(folder, out), out, 3, signal.SIGTERM) == 143
    assert len(checkpoints(out)) == 1 and not (out / "export").exists()
    killed = stop_after(start(folder, out, "--resume"), out, 15, signal.SIGKILL, saved="step-000000010")
    assert killed == -signal.SIGKILL
    (out / "checkpoints" / ".step-000000099").mkdir()  # what a kill in the middle of writing leaves
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 17, "lo')
    assert "going on from" in run(folder, out, "--resume")
    assert without_speed(out) == without_speed(whole)
    assert checkpoints(out) == checkpoints(whole)
    ours, theirs = weights(out), weights(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


BF16 = 2**-7  # twice the largest step between two numbers near 1
# With Adam's usual eps a gradient of 1e-8, whose sign is an accident of rounding, moves a weight by the rate.
SHORT = ["--steps", "4", "--save-every", "2", "--val-every", "2", "--keep", "9", "--lr", "0.001", "--eps", "1e-5"]


@pytest.fixture(scope="module")
def one(folder: Path) -> Path:
    """Return the output of a short run in one process."""
    run(folder, folder / "one", *SHORT)
    return folder / "one"


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Compare losses and every exported weight to 1e-5."""
    assert_same_metrics(ours, theirs, 1e-5)
    left, right = weights(ours), weights(theirs)
    assert left.keys() == right.keys()
    for name, weight in left.items():
        torch.testing.assert_close(weight, right[name], rtol=0, atol=1e-5, msg=name)


def assert_same_metrics(ours: Path, theirs: Path, bound: float) -> None:
    assert len(metrics(ours)) == len(metrics(theirs)) == 4
    for line, other in zip(without_speed(ours), without_speed(theirs), strict=True):
        assert line.keys() == other.keys() and line["expert_load"] == other["expert_load"]
        for name in ("loss", "mtp_loss", "balance_loss", "val_loss", "val_mtp_loss"):
            assert line.get(name) == pytest.approx(other.get(name), abs=bound)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], abs=10 * bound)


def goes_on_in_one(folder: Path, out: Path) -> Path:
    """Go on from step 2 of `out` in one process, in another folder, which is returned."""
    other = out.with_name(f"{out.name}_then_one")
    shutil.copytree(out, other)
    shutil.rmtree(other / "checkpoints" / "step-000000004")
    assert "going on from" in run(folder, other, *SHORT, "--resume", "--no-activation-checkpointing")
    return other


@pytest.mark.parametrize(
    "options",
    [
        ["--accumulation", "2", "--no-async-checkpoints"],
        ["--expert-parallel", "2", "--activation-checkpointing"],
        ["--tensor-parallel", "2"],
    ],
    ids=["data", "expert", "tensor"],
)
def test_two_processes_equal_one(folder: Path, one: Path, options: list[str], request: pytest.FixtureRequest) -> None:
    """On gloo: FSDP2, experts shared out, blocks shared out; then the checkpoint goes on in one process."""
    two = folder / f"two_{request.node.callspec.id}"
    run(folder, two, *SHORT, *options, processes=2)
    assert_same_run(one, two)
    if "--accumulation" not in options:  # which is not free to change
        assert_same_run(one, goes_on_in_one(folder, two))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param([], marks=pytest.mark.slow),
        pytest.param(["--expert-parallel", "2"], marks=pytest.mark.slow),
        ["--tensor-parallel", "2"],
    ],
    ids=["data", "expert", "tensor"],
)
def test_muon_average_and_frozen_weights_in_two_processes(
    folder: Path, options: list[str], request: pytest.FixtureRequest
) -> None:
    """Matrices in parts are gathered for Muon; averages and frozen weights lie in parts, too.

    Muon's iteration in bfloat16 turns other last bits of a gradient into a hundredth of an update, whose root mean
    square is 5e-4 in these steps.
    """
    given = [*SHORT, "--optimizer", "muon", "--ema", "0.5", "--freeze", "embedding,moe.router"]
    one, two = folder / "muon_one", folder / f"muon_{request.node.callspec.id}"
    if not one.exists():
        run(folder, one, *given)
    run(folder, two, *given, *options, processes=2)
    assert_same_metrics(one, two, 1e-4)
    for export in ("export", "export_ema"):
        left, right = (load_file(out / export / "model.safetensors") for out in (one, two))
        assert left.keys() == right.keys()
        for name, weight in left.items():
            assert (weight - right[name]).square().mean().sqrt() < 3e-5, name


@pytest.mark.parametrize(("kv_heads", "processes"), [(1, 2), pytest.param(2, 4, marks=pytest.mark.slow)])
def test_processes_share_a_key_head(folder: Path, kv_heads: int, processes: int) -> None:
    """Each of two computes the keys that its queries need, and their gradients add up."""
    other = folder / f"{kv_heads}_key_heads"
    other.mkdir()
    spec = tiny_spec("ME*")
    spec = replace(
        spec,
        model=replace(spec.model, vocab_size=256),
        mamba=Mamba(num_heads=8, head_dim=16, state_size=16, n_groups=4, chunk_size=16),
        attention=Attention(num_heads=4, num_kv_heads=kv_heads, head_dim=24),
    )
    write_generated(spec, other)
    shutil.copy(folder / "text", other)
    run(other, other / "one", *SHORT)
    run(other, other / "shared", *SHORT, "--tensor-parallel", str(processes), processes=processes)
    assert_same_run(other / "one", other / "shared")


@pytest.mark.parametrize(
    ("options", "processes"),
    [(["--accumulation", "4"], 1), pytest.param([], 2, marks=pytest.mark.slow)],
    ids=["accumulated", "shared"],
)
def test_documents_in_parts_equal_the_whole_batch(
    folder: Path, options: list[str], processes: int, request: pytest.FixtureRequest
) -> None:
    """Parts have different numbers of tokens to predict: their means do not count alike."""
    packed = [*SHORT, "--document-separator", str(ord(" "))]
    whole, other = folder / "packed", folder / f"packed_{request.node.callspec.id}"
    if not whole.exists():
        run(folder, whole, *packed)
    run(folder, other, *packed, *options, processes=processes)
    assert_same_run(whole, other)


@pytest.fixture(scope="module")
def one_in_bf16(folder: Path) -> Path:
    """Return the output of a short run in one process, in bfloat16."""
    run(folder, folder / "one_in_bf16", *SHORT, "--numerics", "bf16")
    return folder / "one_in_bf16"


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--accumulation", "2"],
        ["--expert-parallel", "2", "--activation-checkpointing"],
        ["--tensor-parallel", "2"],
    ],
    ids=["data", "expert", "tensor"],
)
def test_two_processes_in_bf16(
    folder: Path, one_in_bf16: Path, options: list[str], request: pytest.FixtureRequest
) -> None:
    """Matrices are gathered in bfloat16, gradients summed in float32: losses as in one process, to bfloat16's steps."""
    two = folder / f"two_in_bf16_{request.node.callspec.id}"
    run(folder, two, *SHORT, "--numerics", "bf16", *options, processes=2)
    assert len(metrics(two)) == 4
    for line, other in zip(metrics(two), metrics(one_in_bf16), strict=True):
        for name in ("loss", "mtp_loss", "val_loss", "val_mtp_loss"):
            assert line.get(name) == pytest.approx(other.get(name), abs=BF16)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=BF16)
    assert all(weight.dtype == torch.float32 for weight in weights(two).values())


@pytest.mark.slow
def test_four_processes_equal_one(folder: Path, one: Path) -> None:
    """Data x expert x tensor: 1 x 2 x 2, then 2 x 2 x 1 from its checkpoint, then one process."""
    four = folder / "four"
    run(folder, four, *SHORT, "--expert-parallel", "2", "--tensor-parallel", "2", processes=4)
    assert_same_run(one, four)
    shutil.rmtree(four / "checkpoints" / "step-000000004")
    run(folder, four, *SHORT, "--expert-parallel", "2", "--resume", processes=4)
    assert_same_run(one, four)
    assert_same_run(one, goes_on_in_one(folder, four))
    back = folder / "one_then_two"  # whose optimizer has one kernel, which does not take several meshes
    shutil.copytree(one, back)
    shutil.rmtree(back / "checkpoints" / "step-000000004")
    run(folder, back, *SHORT, "--expert-parallel", "2", "--resume", processes=2)
    assert_same_run(one, back)


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on_to_the_same_bits(folder: Path) -> None:
    """SIGTERM to torchrun reaches the processes at different times; they save after the same step."""
    whole, out = folder / "two_whole", folder / "two_stopped"
    options = ["--expert-parallel", "2"]
    run(folder, whole, *options, processes=2)
    assert stop_after(start(folder, out, *options, processes=2), out, 3, signal.SIGTERM) != 0
    assert len(checkpoints(out)) == 1 and checkpoints(out)[0].startswith("step-")
    run(folder, out, *options, "--resume", processes=2)
    assert without_speed(out) == without_speed(whole)
    ours, theirs = weights(out), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--expert-parallel", "3"], "2 processes do not divide into 3 expert-parallel x 1 tensor-parallel"),
        (["--weights", "broken"], "the weight backbone.layers.2.mixer.o_proj.weight was not finite before the step"),
    ],
)
def test_two_processes_fail_together(folder: Path, options: list[str], message: str) -> None:
    """Each says the same and ends with the same code; torchrun ends with its own."""
    module = load_package(folder)
    model = module.Model()
    torch.nn.init.constant_(model.backbone.layers[2].mixer.o_proj.weight, torch.nan)
    module.save_checkpoint(model, folder / "broken")
    process = start(folder, folder / "failed", *options, processes=2)
    _, printed = process.communicate(timeout=120)
    assert process.returncode != 0
    assert printed.count(f"error: {message}") == 2 or printed.count(message) >= 2
