"""How time and memory of a decode plan grow with the layers of the model."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from n3c.specs.load import load_spec

TITLE = "`n3c build --target trt`"

COLUMNS = ("layers", "plans", "emit s", "build s", "CPU s", "plan MB", "peak GB", "CPU s a layer", "times the peer's",
           "precision")  # fmt: skip
STAGE_LAYERS = 22
"""Layers of a stage, where plans are built in stages."""
SPECS = Path(__file__).parents[1] / "specs"


@dataclass(frozen=True, slots=True)
class Built:
    """One build, in a process of its own."""

    layers: int
    emit_seconds: float
    build_seconds: float
    """Parsing, building and auditing."""
    cpu_seconds: float
    """Of both, by all threads: what other work on the machine disturbs least."""
    plan_bytes: int
    peak_bytes: int
    mismatches: int

    @property
    def seconds_a_layer(self) -> float:
        """Processor seconds of emission and building for each layer."""
        return self.cpu_seconds / self.layers


def run(quick: bool) -> Iterator[str]:
    """Yield a table a model: the first eighth, quarter, half and all of its layers at batch 1."""
    for name in ("super", "ultra"):
        path = SPECS / f"{name}.toml"
        symbols = load_spec(path)[0].model.pattern.symbols
        parts = (8, 4) if quick else (8, 4, 2, 1)
        yield f"\n{name}.toml, decode at batch 1, cut to the first layers; peer: the smallest cut.\n"
        yield f"| {' | '.join(COLUMNS)} |"
        yield "|" + "---:|" * len(COLUMNS)
        first = 0.0
        cuts = [(symbols[: len(symbols) // part], 1) for part in parts]
        stages = round(len(cuts[-1][0]) / STAGE_LAYERS)
        for cut, plans in cuts if stages < 2 else [*cuts, (cuts[-1][0], stages)]:
            built = build_cut(path, cut, plans)
            first = first or built.seconds_a_layer
            yield _row(built, plans, built.seconds_a_layer / first)


def _row(built: Built, plans: int, ratio: float) -> str:
    cells = (
        f"{built.layers} | {plans} | {built.emit_seconds:.2f} | {built.build_seconds:.1f} | {built.cpu_seconds:.1f}",
        f"{built.plan_bytes / 1e6:.2f} | {built.peak_bytes / 1e9:.2f}",
        f"{built.seconds_a_layer:.3f} | {ratio:.2f} | {_verdict(built)}",
    )
    return f"| {' | '.join(cells)} |"


def _verdict(built: Built) -> str:
    return f"{built.mismatches} not realised" if built.mismatches else "all realised"


def build_cut(spec: Path, symbols: str, stages: int = 1) -> Built:
    """Build the decode plans of the first layers of `spec`, whose symbols are `symbols`, in `stages` pieces."""
    training = load_spec(spec)[0].training
    rules = training.rules if training is not None else ()
    overrides = [f"model.pattern={symbols}", "serving.batch_sizes=[1]"]
    # A cut may be shorter than "last 14"; training rules change nothing of a plan.
    overrides += [f"training.rules.{i}.layers=all" for i, rule in enumerate(rules) if rule.layers != "all"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.build_once", str(spec), f"{folder}/out", str(stages), *overrides]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    return Built(len(symbols), **json.loads(done.stdout))
