"""From data to tokens by the commands as users give them, on the device and on this machine's CPU.

specs/tiny.toml learns the bytes of this repository by the generated train.py in each kind of numerics, compiled,
resumed and distilled; the weights are quantized, and `n3c run` continues a prompt. A difference of losses is that from
the same run on the CPU in float32, over the steps of both.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .part import SPECS, Row, Setting, report, side_by_side

TITLE = "Commands"
PROMPT = "def __init__(self"


def run(setting: Setting) -> Iterator[Row]:
    """Yield what each command gave."""
    with tempfile.TemporaryDirectory() as name:
        road = Road(Path(name), setting)
        road.n3c("build", str(SPECS / "tiny.toml"), "--target", "torch", "-o", str(road.folder / "tiny"))
        yield from _guarded(road.trained())
        yield from _guarded(road.served())


def _guarded(rows: Iterator[Row]) -> Iterator[Row]:
    try:
        yield from rows
    except (subprocess.CalledProcessError, OSError, ValueError, KeyError) as error:
        said = getattr(error, "stderr", None) or str(error)
        yield {"command": "the rest", "error": "\n".join(said.strip().splitlines()[-3:])[:500]}


class Road:
    """The commands, in a folder."""

    def __init__(self, folder: Path, setting: Setting) -> None:
        self.folder, self.setting = folder, setting
        self.device = "cuda" if setting.device == "cuda" else "cpu"
        self.steps, self.rows, self.length = (4, 2, 64) if setting.tiny else (24, 4, 128)
        sources = sorted((SPECS.parent / "compiler").rglob("*.py"))
        (folder / "text").write_bytes(b"\n".join(source.read_bytes() for source in sources))

    def n3c(self, *arguments: str) -> str:
        """Run n3c from this checkout; return what it prints."""
        return self._run([sys.executable, "-c", "from n3c.compiler.cli.main import main; main()", *arguments], "cuda")

    def train(self, out: str, *options: str, device: str = "cuda") -> list[float]:
        """Train into `out`; return the loss of each step."""
        program = self.folder / "tiny" / "torch" / "train.py"
        sizes = ("--steps", self.steps, "--batch-size", self.rows, "--seq-len", self.length, "--lr", 2e-3)
        data = ("--data", self.folder / "text", "--data-format", "bytes", "--out", self.folder / out)
        self._run([sys.executable, program, *data, *sizes, "--log-every", 1000, *options], device)
        lines = (self.folder / out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [row["loss"] for row in map(json.loads, lines) if "loss" in row]

    def _run(self, command: Sequence[object], device: str) -> str:
        threads = max(1, (os.cpu_count() or 1) // side_by_side())
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        done = subprocess.run(
            [str(part) for part in command], env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout

    def trained(self) -> Iterator[Row]:
        """Yield the losses by numerics, and how far they are from the CPU's."""
        start = ("--weights", self._begun())  # each device draws its own
        exact = self.train("cpu", "--numerics", "float32", *start, device="cpu")
        half = self.steps // 2
        runs: list[tuple[str, str, Sequence[str]]] = [
            ("default numerics", "default", ()),
            ("float32", "float32", ("--numerics", "float32", "--save-every", str(half))),
            ("bf16", "bf16", ("--numerics", "bf16")),
            ("bf16-split", "bf16-split", ("--numerics", "bf16-split")),
            ("bf16, compiled", "compiled", ("--numerics", "bf16", "--compile")),
            ("nvfp4", "nvfp4", ("--numerics", "nvfp4")),
        ]
        if self.setting.tiny:
            runs = runs[1:2]
        with ThreadPoolExecutor(side_by_side()) as pool:
            for compared in [pool.submit(self._compared, exact, start, *run) for run in runs]:
                yield compared.result()
        resumed = ("--numerics", "float32", "--resume-step", str(half))
        yield self._compared(exact, start, "float32, resumed in the middle", "float32", resumed)

    def _compared(self, exact: list[float], start: Sequence[str], title: str, out: str, options: Sequence[str]) -> Row:
        """Return how far the losses of a run are from those of the CPU."""
        begin = time.monotonic()
        try:
            losses = self.train(out, *start, *options)
        except subprocess.CalledProcessError as error:
            return {"command": f"train.py, {title}", "error": "\n".join(error.stderr.strip().splitlines()[-3:])}
        pairs = list(zip(losses, exact, strict=False))
        early = pairs[: max(2, self.steps // 5)]
        return {
            "command": f"train.py, {title}",
            "steps": len(losses),
            "first loss": round(losses[0], 4),
            "last loss": round(losses[-1], 4),
            "most from the CPU's, first fifth": f"{max(abs(a - b) for a, b in early):.1e}",
            "all": f"{max(abs(a - b) for a, b in pairs):.1e}",
            "s": round(time.monotonic() - begin, 1),
        }

    def _begun(self) -> str:
        """Return the folder of the weights that every run begins with: fresh ones, moved on by one step."""
        steps, self.steps = self.steps, 1
        self.train("begun", "--numerics", "float32", device="cpu")
        self.steps = steps
        return str(self.folder / "begun" / "export")

    def served(self) -> Iterator[Row]:
        """Yield whether quantized weights give the same tokens on both devices, and are distilled alike."""
        weights, nvfp4 = self.folder / "cpu" / "export", self.folder / "quantized"
        self.n3c("quantize", str(SPECS / "tiny.toml"), "--weights", str(weights), "-o", str(nvfp4))
        for title, given in (("as trained", weights), ("NVFP4", nvfp4)):
            for options in ((), ("--no-mtp",)):
                tokens = [self._tokens(given, device, *options) for device in ("cpu", self.device)]
                same = next((i for i, (a, b) in enumerate(zip(*tokens, strict=True)) if a != b), len(tokens[0]))
                yield {
                    "command": " ".join(("n3c run", *options)),
                    "weights": title,
                    "tokens": len(tokens[0]),
                    "as on the CPU": same,
                }
        distil = ("--teacher", str(weights), "--weights", str(weights), "--quantized", str(nvfp4))
        exact = self.train("distilled-cpu", "--numerics", "float32", *distil, device="cpu")
        losses = self.train("distilled", "--numerics", "float32", *distil)
        yield {
            "command": "train.py, distilled into NVFP4",
            "first loss": f"{losses[0]:.3e}",
            "last loss": f"{losses[-1]:.3e}",
            "the CPU's last": f"{exact[-1]:.3e}",
        }
        build, where = str(self.folder / "tiny"), ("--engine", "torch", "--device", self.device)
        sizes = ("--batch", "1", "--context", "128")
        measured = json.loads(self.n3c("bench", build, "--weights", str(nvfp4), *where, *sizes, "--json"))
        for row in measured["rows"]:
            yield {
                "command": "n3c bench, tiny",
                "first token ms": row["time_to_first_token_ms"]["p50"],
                "a token ms": row["time_per_token_ms"]["p50"],
                "acceptance": row["acceptance_length"],
            }

    def _tokens(self, weights: Path, device: str, *options: str) -> list[int]:
        build, where = str(self.folder / "tiny"), ("--engine", "torch", "--device", device)
        new = ("--max-new-tokens", "16" if self.setting.tiny else "96", "--ignore-eos", "--json")
        given: Any = json.loads(
            self.n3c("run", build, "--weights", str(weights), "--prompt", PROMPT, *where, *new, *options)
        )
        return list(given["token_ids"])


if __name__ == "__main__":
    report(run)
