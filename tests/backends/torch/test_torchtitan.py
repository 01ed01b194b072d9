"""torchtitan's own main trains the emitted adapter, in 2 CPU processes, on Python's sources; `make test-oracles`."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from n3c.specs.load import load_spec
from support import torchtitan_cpu
from support.specs import SPECS

from .generated import write_generated

pytestmark = pytest.mark.oracles

STEPS, SAVED = 8, 4
OURS = [
    *("--steps", str(STEPS), "--batch-size", "4", "--seq-len", "64", "--lr", "0.001"),
    *("--warmup", str(2 / STEPS), "--decay", "0", "--val-fraction", "0.05", "--val-every", "1000"),
]
THEIRS = [
    *("--training.steps", str(STEPS), "--training.seq-len", "64", "--training.mixed-precision-param", "float32"),
    *("--lr-scheduler.warmup-steps", "2", "--lr-scheduler.decay-ratio", "0"),
    *("--checkpoint.interval", str(SAVED), "--metrics.log-freq", "1", "--metrics.disable-color-printing"),
]
TWO_OF_TWO = ["--training.local-batch-size", "2"]
FUSED = [*TWO_OF_TWO, "--optimizer.implementation", "fused"]  # as train.py has it where there is one mesh


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with all that is generated of specs/tiny.toml, and a text."""
    folder = tmp_path_factory.mktemp("titan")
    write_generated(load_spec(SPECS / "tiny.toml")[0], folder)
    sources = sorted(Path(os.__file__).parent.glob("*.py"))[:20]
    (folder / "text").write_bytes(b"".join(source.read_bytes() for source in sources))
    return folder


def start(folder: Path, program: Path, *arguments: str) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(folder)}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.Popen(
        [*launcher, str(program), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env=environment,
        start_new_session=True,
    )


def start_titan(folder: Path, out: Path, *options: str, config: str = "pretrain") -> subprocess.Popen[str]:
    choice = ["--module", "torchtitan_adapter", "--config", config, "--dump-folder", str(out)]
    data = ["--dataloader.dataset-path", str(folder / "text")]
    return start(folder, Path(torchtitan_cpu.__file__), *choice, *data, *THEIRS, *options)


def finish(process: subprocess.Popen[str]) -> str:
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed[-6000:]
    return printed


def losses(printed: str) -> dict[int, float]:
    """Return the loss of each step, as torchtitan prints it: to 1e-5."""
    return {int(step): float(loss) for step, loss in re.findall(r"step: +(\d+) +loss: +([\d.]+)", printed)}


def export(folder: Path, out: Path) -> dict[str, torch.Tensor]:
    """Return the last weights in the released layout, by the adapter's own command."""
    command = [sys.executable, "torchtitan_adapter.py", str(out / f"checkpoint/step-{STEPS}"), str(out / "export")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (out / "export/config.json").exists()
    return load_file(out / "export/model.safetensors")


@pytest.fixture(scope="module")
def trained(folder: Path) -> tuple[Path, dict[int, float]]:
    """Return the output of a run that nothing disturbed, and its losses."""
    return folder / "whole", losses(finish(start_titan(folder, folder / "whole", *FUSED)))


def test_loss_falls(trained: tuple[Path, dict[int, float]]) -> None:
    _, found = trained
    assert list(found) == list(range(1, STEPS + 1))
    assert found[STEPS] < found[1] - 1


def test_equals_train_py(folder: Path, trained: tuple[Path, dict[int, float]]) -> None:
    """The same weights, bit for bit, as after as many steps of train.py in 2 processes."""
    out, found = trained
    ours = folder / "ours"
    finish(start(folder, folder / "train.py", "--data", str(folder / "text"), "--out", str(ours), *OURS))
    lines = [json.loads(line) for line in (ours / "metrics.jsonl").read_text().splitlines()]
    total = {m["step"]: m["loss"] + 0.3 * m["mtp_loss"] + 1e-4 * m["balance_loss"] for m in lines}
    assert found == pytest.approx(total, abs=2e-5)
    left, right = export(folder, out), load_file(ours / "export/model.safetensors")
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_killed_and_resumed(folder: Path, trained: tuple[Path, dict[int, float]]) -> None:
    """A run that is killed after its checkpoint goes on to the losses and the weights of one that was not."""
    out, found = trained
    killed = folder / "killed"
    process = start_titan(folder, killed, *FUSED, "--training.steps", "1000", "--lr-scheduler.total-steps", "8")
    metadata = killed / f"checkpoint/step-{SAVED}/.metadata"
    deadline = time.monotonic() + 300
    while not metadata.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    for later in (killed / "checkpoint").glob("step-*"):
        if later.name != f"step-{SAVED}":
            shutil.rmtree(later)
    resumed = losses(finish(start_titan(folder, killed, *FUSED)))
    assert resumed == {step: loss for step, loss in found.items() if step > SAVED}
    left, right = export(folder, killed), load_file(out / "export/model.safetensors")
    assert all(torch.equal(left[name], right[name]) for name in right)


@pytest.mark.parametrize(
    "options",
    [
        [*TWO_OF_TWO, "--parallelism.expert-parallel-degree", "2"],
        ["--training.local-batch-size", "4", "--parallelism.tensor-parallel-degree", "2"],
        ["--training.local-batch-size", "1", "--training.global-batch-size", "4"],
        [
            *TWO_OF_TWO,
            "--parallelism.data-parallel-shard-degree",
            "1",
            "--parallelism.data-parallel-replicate-degree",
            "2",
        ],
    ],
    ids=["expert", "tensor", "accumulation", "replicated"],
)
def test_parallelism(options: list[str], folder: Path, trained: tuple[Path, dict[int, float]]) -> None:
    found = losses(finish(start_titan(folder, folder / options[-2].strip("-"), *options)))
    assert found == pytest.approx(trained[1], abs=2e-5)


def test_released_weights_and_nvfp4(folder: Path, trained: tuple[Path, dict[int, float]]) -> None:
    """From exported weights the loss goes on where it was; emulated NVFP4 costs a little."""
    start_from = ["--hf-assets-path", str(trained[0] / "export"), *TWO_OF_TWO, "--training.steps", "2"]
    if not (trained[0] / "export").exists():
        export(folder, trained[0])
    plain = losses(finish(start_titan(folder, folder / "again", *start_from)))
    low = losses(finish(start_titan(folder, folder / "low", *start_from, config="pretrain_nvfp4")))
    assert plain[1] < trained[1][1] - 1
    assert 0 < abs(low[1] - plain[1]) < 0.1


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("context-parallel-degree", "no context parallelism: a scan's state passes through the whole sequence"),
        ("pipeline-parallel-degree", "does not support pipelining"),
    ],
)
def test_what_is_refused(option: str, reason: str, folder: Path) -> None:
    process = start_titan(folder, folder / option, *TWO_OF_TWO, f"--parallelism.{option}", "2")
    printed, _ = process.communicate(timeout=300)
    assert process.returncode != 0 and reason in printed, printed[-3000:]
