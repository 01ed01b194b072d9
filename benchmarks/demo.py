"""`make demo`: the whole way of a model on a CPU, from nothing, in about ten minutes on two cores.

Trains specs/tiny.toml with the generated code on the source files of Python's own standard library, quantizes
the weights to NVFP4, builds ONNX graphs and TensorRT plans, verifies that all implementations agree, and generates text
with and without multi-token prediction. What it prints at the end is one table.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from n3c.backends.torch.loading import load_package
from n3c.compiler.cli.table import format_table
from n3c.compiler.report.units import format_bytes
from n3c.runtime.build_folder import OpenedBuild, open_build
from n3c.runtime.generation.loop import Generation
from n3c.runtime.generation.runner import Runner, open_runner
from n3c.runtime.generation.sequence import Options

ROOT = Path(__file__).parents[1]
SPEC = ROOT / "specs" / "tiny.toml"
N3C = Path(sys.executable).with_name("n3c")
HELD_OUT = 20
"""Every so many files are not trained on."""
MARK = ".n3c-demo"
"""The file that says that a folder is the demo's own."""
MADE = ("text", "held_out", "tiny", "run", "nvfp4")
"""The folders that it makes there."""
SAMPLE = "def read(self, size"


@dataclass(frozen=True)
class Speed:
    """How the prompts were continued."""

    tokens: list[list[int]]
    tokens_per_second: float
    acceptance_length: float


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "demo", help="folder of all that is made")
    parser.add_argument("--steps", type=int, default=240, help="optimizer steps of 4,096 bytes each (240)")
    parser.add_argument("--prompts", type=int, default=200, help="prompts continued with and without drafts (200)")
    parser.add_argument("--trained", type=Path, help="weights that a training run has exported: do not train")
    arguments = parser.parse_args()
    work: Path = arguments.work
    trained: Path = arguments.trained or work / "run" / "export"
    begin(work)
    start = time.monotonic()

    def phase(title: str) -> None:
        print(f"\n== {time.monotonic() - start:4.0f} s  {title}", flush=True)

    phase("text: the standard library of this Python")
    size = copy_text(work)
    print(f"{size:,} bytes to train on")

    phase(f"train specs/tiny.toml, {arguments.steps} steps, with the generated train.py")
    n3c("build", SPEC, "--target", "torch", "-o", work / "tiny")
    train = [work / "tiny" / "torch" / "train.py", "--data", work / "text", "--out", work / "run", "--lr", 2e-3]
    if arguments.trained is None:
        run(sys.executable, *train, "--steps", arguments.steps, "--log-every", max(1, arguments.steps // 12))

    phase("quantize to NVFP4")
    print(n3c("quantize", SPEC, "--weights", trained, "-o", work / "nvfp4", "--search", "mse"))

    phase("build ONNX graphs and TensorRT plans")
    print(n3c("build", SPEC, "--target", "trt", "-o", work / "tiny").splitlines()[-1])

    phase("verify: PyTorch, ONNX Runtime and the ONNX files against the reference, layer by layer")
    verified = json.loads(n3c("verify", work / "tiny", "--weights", work / "nvfp4", "--json"))

    phase(f"{arguments.prompts} prompts, token by token and with drafts")
    build = open_build(work / "tiny")
    prompts = make_prompts(work, arguments.prompts)
    runners = [open_runner(build, work / "nvfp4", speculate=speculate) for speculate in (False, True)]
    plain, drafted = generate(runners, prompts)
    print(f"{SAMPLE}{sample(runners[1])}")

    phase("done")
    print(table(build, work, trained, verified, plain, drafted))
    different = sum(a != b for a, b in zip(plain.tokens, drafted.tokens, strict=True))
    if different or not verified["ok"]:
        sys.exit(5)


def begin(work: Path) -> None:
    """Make the folder, or remove from it what an earlier demo made; exit with 2 where it is somebody else's."""
    mark = work / MARK
    if (work.exists() and not work.is_dir()) or (work.is_dir() and any(work.iterdir()) and not mark.is_file()):
        print(f"{work} is not of an earlier demo, and is left as it is: give --work another folder", file=sys.stderr)
        sys.exit(2)
    work.mkdir(parents=True, exist_ok=True)
    mark.touch()
    for name in MADE:
        shutil.rmtree(work / name, ignore_errors=True)


def n3c(*arguments: object) -> str:
    """Run the command line tool and return its output; its failure is ours."""
    return run(N3C, *arguments, capture=True)


def run(*command: object, capture: bool = False) -> str:
    """Run a program and return its output where it is captured."""
    done = subprocess.run(
        [str(part) for part in command], check=False, text=True, stdout=subprocess.PIPE if capture else None
    )
    if done.returncode:
        print(done.stdout or "")
        sys.exit(done.returncode)
    return done.stdout or ""


def copy_text(work: Path) -> int:
    """Copy the modules of the standard library, the top folder and its packages; return the bytes to train on."""
    library = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    found = sorted(p for p in library.rglob("*.py") if not skipped & set(p.relative_to(library).parts[:-1]))
    size = 0
    for i, path in enumerate(found):
        folder = work / ("held_out" if i % HELD_OUT == 0 else "text")
        target = folder / path.relative_to(library)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        size += path.stat().st_size if folder.name == "text" else 0
    return size


def held_out(work: Path) -> bytes:
    """Return the text that was not trained on."""
    return b"".join(path.read_bytes() for path in sorted((work / "held_out").rglob("*.py")))


def make_prompts(work: Path, count: int) -> list[list[int]]:
    """Return prompts of 1 to 60 bytes: every other one random bytes, the others from the text that is held out."""
    text, random = held_out(work), np.random.default_rng(0)
    prompts: list[list[int]] = []
    for i in range(count):
        length = int(random.integers(1, 61))
        at = int(random.integers(len(text) - length))
        prompts.append(random.integers(0, 256, length).tolist() if i % 2 else list(text[at : at + length]))
    return prompts


def generate(runners: Sequence[Runner], prompts: Sequence[list[int]]) -> list[Speed]:
    """Continue every prompt greedily by 32 bytes with each of `runners`, in turn, so that both see the same load."""
    options = Options(max_new_tokens=32)
    made: list[list[Generation]] = [[] for _ in runners]
    for prompt in prompts:
        for runner, done in zip(runners, made, strict=True):
            done.append(runner.generation([prompt], options))
            done[-1].run()
    return [_speed(done) for done in made]


def _speed(done: list[Generation]) -> Speed:
    decoded = sum(generation.statistics.decoded for generation in done)
    return Speed(
        [generation.sequences[0].new for generation in done],
        decoded / sum(generation.statistics.decode_seconds for generation in done),
        decoded / sum(generation.statistics.rounds for generation in done),
    )


def sample(runner: Runner) -> str:
    """Return what the model makes of a first line."""
    assert runner.tokenizer is not None
    generation = runner.generation([runner.tokenizer.encode(SAMPLE)], Options(max_new_tokens=160))
    generation.run()
    growing = generation.sequences[0].growing
    assert growing is not None
    growing.finish()
    return growing.text


def loss(build: OpenedBuild, weights: Path, text: bytes) -> float:
    """Return the mean loss, in nats a byte, of the generated module on 64 pieces of `text`."""
    module = load_package(build.out / "torch")
    model = module.Model().eval()
    module.load_checkpoint(model, weights)
    pieces = np.frombuffer(text, np.uint8)[: 64 * 256].reshape(64, 256).astype(np.int64)
    total = 0.0
    with torch.no_grad():
        for piece in torch.from_numpy(pieces).split(8):
            logits = model(piece).logits
            total += float(F.cross_entropy(logits[:, :-1].flatten(0, 1), piece[:, 1:].flatten())) * len(piece)
    return total / len(pieces)


def table(build: OpenedBuild, work: Path, trained: Path, verified: dict[str, Any], plain: Speed, drafted: Speed) -> str:
    """Return the table."""
    text, quantized = held_out(work), work / "nvfp4"
    plans = [file for file in build.manifest["files"] if file["path"].endswith(".plan")]
    worst = {form["name"]: form["worst"]["relative"] for form in verified["implementations"]}
    different = sum(a != b for a, b in zip(plain.tokens, drafted.tokens, strict=True))

    def size(folder: Path) -> str:
        return format_bytes(sum(path.stat().st_size for path in folder.glob("*.safetensors")))

    rows = [
        ("trained, PyTorch", f"{loss(build, trained, text):.3f}", size(trained), "", "", ""),
        (
            "NVFP4, PyTorch",
            f"{loss(build, quantized, text):.3f}",
            size(quantized),
            "",
            "",
            f"{worst['PyTorch']:.1e}",
        ),
        (
            "NVFP4, ONNX Runtime",
            "",
            "",
            f"{plain.tokens_per_second:.0f}",
            f"{plain.acceptance_length:.2f}",
            f"{worst['ONNX Runtime, float32']:.1e}",
        ),
        (
            "the same with MTP",
            "",
            "",
            f"{drafted.tokens_per_second:.0f}",
            f"{drafted.acceptance_length:.2f}",
            f"{different} of {len(plain.tokens)} texts",
        ),
        ("NVFP4, ONNX files", "", "", "", "", f"{worst['ONNX files, reference evaluator']:.1e}"),
        (f"TensorRT, {len(plans)} plans", "", format_bytes(sum(p["bytes"] for p in plans)), "", "", "needs a GPU"),
    ]
    header = ("form", "loss, nats a byte", "size", "tokens/s", "acceptance length", "difference")
    return format_table(header, rows)


if __name__ == "__main__":
    main()
