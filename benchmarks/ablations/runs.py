"""The runs: the generated train.py, once for each arm and seed, as a user would call it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from n3c.backends.torch.context import package_name
from n3c.backends.torch.emit import emit
from n3c.backends.torch.loading import write_files
from n3c.specs.dump import dump_spec

from ..auto_quantize import corpus
from .arms import Arm


@dataclass(frozen=True, slots=True)
class Length:
    """How long the runs are."""

    steps: int
    batch_size: int = 8
    seq_len: int = 128
    lr: float = 3e-3
    validation_sequences: int = 256

    @property
    def tokens(self) -> int:
        """Tokens that a run trains on."""
        return self.steps * self.batch_size * self.seq_len


@dataclass(frozen=True, slots=True)
class Run:
    """The result of a finished run: losses of the next token, without MTP, in bits a byte."""

    arm: str
    seed: int
    validation: float
    curve: list[tuple[int, float]]
    """(step, training loss)"""


def run_all(arms: list[Arm], seeds: int, length: Length, folder: Path, jobs: int) -> list[Run]:
    """Return the runs of all arms; those that are already in `folder` are not repeated.

    `jobs` run at once, each on one thread. RuntimeError, with what train.py said, where one fails.
    """
    text, held_out = corpus()
    folder.mkdir(parents=True, exist_ok=True)
    text.tofile(folder / "text")
    held_out.tofile(folder / "held-out")
    todo = [(arm, seed) for seed in range(seeds) for arm in arms]
    with ThreadPoolExecutor(jobs) as pool:
        return [pending.result() for pending in [pool.submit(run_one, *one, length, folder) for one in todo]]


def run_one(arm: Arm, seed: int, length: Length, folder: Path) -> Run:
    """Build the arm's training code, run it, and return what it measured."""
    code = emit(arm.spec, hashlib.sha256(dump_spec(arm.spec).encode()).hexdigest())
    for constant, value in arm.switches.items():
        numerics = f"{package_name(arm.spec)}/numerics.py"
        code[numerics], count = re.subn(rf"^{constant} = \w+", f"{constant} = {value}", code[numerics], flags=re.M)
        assert count == 1, constant
    options = {
        "steps": length.steps,
        "batch-size": length.batch_size,
        "seq-len": length.seq_len,
        "lr": length.lr,
        "seed": seed,
        "numerics": arm.numerics,
        "val-every": length.steps,
        "val-sequences": length.validation_sequences,
        "save-every": length.steps,
    }
    digest = hashlib.sha256(json.dumps([code, options], sort_keys=True).encode()).hexdigest()[:12]
    place = folder / f"{arm.name}-{seed}-{digest}"
    if not (place / "done").exists():
        write_files(code, place / "torch")
        command: list[str | Path] = [sys.executable, place / "torch" / "train.py", "--out", place / "run"]
        command += ["--data", folder / "text", "--val-data", folder / "held-out"]
        command += [part for key, value in options.items() for part in (f"--{key}", str(value))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise RuntimeError(f"{arm.name}, seed {seed}: train.py ended with {done.returncode}\n{done.stderr}")
        (place / "done").touch()
    lines = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    curve = [(line["step"], line["loss"] / math.log(2)) for line in lines]
    return Run(arm.name, seed, lines[-1]["val_bits_per_byte"], curve)


def mean_curve(runs: list[Run], window: int) -> list[tuple[float, float]]:
    """Return (step, bits a byte), averaged over the runs and over `window` steps."""
    losses = np.array([[loss for _, loss in run.curve] for run in runs]).mean(0)
    ends = range(window, len(losses) + 1, window)
    return [(float(end), float(losses[end - window : end].mean())) for end in ends]
