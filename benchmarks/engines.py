"""Time and memory of building plans: by the layers of a model, and for whole models with all entry points."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from n3c.backends.trt.targets import PORTABLE, named
from n3c.specs.load import load_spec

TITLE = "`n3c build --target trt`"

COLUMNS = ("layers", "plans", "emit s", "build s", "CPU s", "plan MB", "peak GB", "CPU s a layer", "times the peer's",
           "precision")  # fmt: skip
WHOLE = ("spec", "SM", "stages", "plans", "wall s", "CPU s", "plans MB", "peak GB", "precision")
ENTRIES = ("entry point", "plans", "s", "MB", "kernels", "scratch MB", "moved a call, MB", "times the least")
STAGE_LAYERS = 22
"""Layers of a stage, where plans are built in stages."""
ONE_PLAN_LAYERS = 64
"""Whole models with more layers are built in stages."""
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
    plans: dict[str, dict[str, Any]]

    @property
    def seconds_a_layer(self) -> float:
        """Processor seconds of emission and building for each layer."""
        return self.cpu_seconds / self.layers


def run(quick: bool) -> Iterator[str]:
    """Yield a table a model: the first eighth, quarter, half and all of its layers at batch 1; then whole models."""
    for name in ("super", "ultra"):
        path = SPECS / f"{name}.toml"
        symbols = load_spec(path)[0].model.pattern.symbols
        parts = (8, 4) if quick else (8, 4, 2, 1)
        yield f"\n{name}.toml, decode at batch 1, cut to the first layers; peer: the smallest cut.\n"
        yield from _head(COLUMNS)
        first = 0.0
        cuts = [(symbols[: len(symbols) // part], 1) for part in parts]
        stages = round(len(cuts[-1][0]) / STAGE_LAYERS)
        for cut, plans in cuts if stages < 2 else [*cuts, (cuts[-1][0], stages)]:
            built = build_cut(path, cut, plans)
            first = first or built.seconds_a_layer
            yield _row(built, plans, built.seconds_a_layer / first)
    yield from _whole_models(quick)


def _whole_models(quick: bool) -> Iterator[str]:
    """Yield what whole builds take, with every entry point at every batch size of the spec, and each of their plans."""
    cases = [("tiny", "120")] if quick else [(name, "120") for name in ("nano", "super", "ultra")]
    made: list[tuple[str, Built]] = []
    yield "\nWhole models, every entry point at every batch size of the spec, no weights.\n"
    yield from _head(WHOLE)
    for name, sms in [*cases, (cases[0][0], named(PORTABLE))]:
        path = SPECS / f"{name}.toml"
        layers = len(load_spec(path)[0].model.pattern)
        stages = layers // STAGE_LAYERS if layers > ONE_PLAN_LAYERS else 1
        built = _build(path, layers, "--sm", sms, "--stages", str(stages))
        made.append((f"{name}.toml for SM {sms}", built))
        wall = (
            f"{stages} | {len(built.plans)} | {built.emit_seconds + built.build_seconds:.0f} | {built.cpu_seconds:.0f}"
        )
        sizes = f"{built.plan_bytes / 1e6:.1f} | {built.peak_bytes / 1e9:.2f}"
        yield f"| {name} | {sms} | {wall} | {sizes} | {_verdict(built)} |"
    for title, built in made:
        yield f"\n{title}: each entry point, its stages together, and its traffic as in audit.json.\n"
        yield from _head(ENTRIES)
        for entry, group in groupby(built.plans.items(), lambda item: ".".join(item[0].split(".")[:2])):
            yield _entry_row(entry, [found for _, found in group])


def _entry_row(entry: str, plans: list[dict[str, Any]]) -> str:
    def total(key: str) -> float:
        return sum(float(found[key]) for found in plans)

    moved, least = (sum(found["traffic"][key] for found in plans) for key in ("bytes", "ideal"))
    cells = f"{total('seconds'):.0f} | {total('bytes') / 1e6:.1f} | {total('kernels'):.0f}"
    scratch = max(found["scratch_bytes"] for found in plans) / 1e6
    return f"| {entry} | {len(plans)} | {cells} | {scratch:.1f} | {moved / 1e6:,.1f} | {moved / least:.3f} |"


def _head(columns: tuple[str, ...]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---:|" * len(columns)


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
    options = [option for override in overrides for option in ("--set", override)]
    return _build(spec, len(symbols), "--entry", "decode", "--stages", str(stages), *options)


def _build(spec: Path, layers: int, *options: str) -> Built:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.build_once", str(spec), f"{folder}/out", *options]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    return Built(layers, **json.loads(done.stdout))
