"""Building plans several at once, and taking them from the cache, against building one after the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from n3c.backends.machine import usable_cores

TITLE = "Plans: several at once, and the cache"
SPECS = Path(__file__).parents[1] / "specs"
COLUMNS = ("spec", "stages", "plans", "jobs", "cache", "wall s", "times one after the other", "CPU s", "peak GB")


def run(quick: bool) -> Iterator[str]:
    """Yield a table: each build one after the other (the peer), several at once, and twice with an empty cache."""
    jobs = str(max(2, usable_cores()))
    yield f"| {' | '.join(COLUMNS)} |"
    yield "|" + "---:|" * len(COLUMNS)
    cases = (
        [("tiny", "1", ("--entry", "draft"))] if quick else [("super", "1", ("--entry", "decode")), ("super", "4", ())]
    )
    for name, stages, options in cases:
        with tempfile.TemporaryDirectory() as folder:
            arguments = (str(SPECS / f"{name}.toml"), f"{folder}/out", "--stages", stages, *options)
            peer = 0.0
            for cache, at_once in (("none", "1"), ("none", jobs), ("empty", jobs), ("filled", jobs)):
                more = () if cache == "none" else ("--cache",)
                seconds, found = _build(folder, *arguments, "--jobs", at_once, *more)
                peer = peer or seconds
                cells = (name, stages, str(len(found["plans"])), at_once, cache, f"{seconds:.1f}")
                figures = (f"{seconds / peer:.2f}", f"{found['cpu_seconds']:.0f}", f"{found['peak_bytes'] / 1e9:.2f}")
                yield f"| {' | '.join((*cells, *figures))} |"


def _build(folder: str, *arguments: str) -> tuple[float, dict[str, Any]]:
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.build_once", *arguments],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"N3C_CACHE_DIR": f"{folder}/cache"},
    )
    return time.perf_counter() - begun, json.loads(done.stdout)
