"""`python -m benchmarks.build_once SPEC OUT [n3c build's options …]`: build plans and print what it took as JSON."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import time
from pathlib import Path

from n3c.backends.trt.module import load_trt
from n3c.compiler import build
from n3c.compiler.cli.progress import TerminalProgress


class Timed(TerminalProgress):
    """Progress that keeps the seconds of each phase, and those of each plan, and shows nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = {}
        self.plan_seconds: dict[str, float] = {}
        self._now, self._since = "", time.perf_counter()

    def phase(self, name: str) -> None:
        """End the last phase and begin the next."""
        now = time.perf_counter()
        self.seconds[self._now] = self.seconds.get(self._now, 0.0) + now - self._since
        self._now, self._since = name, now

    def step(self, what: str, done: int = 0, total: int = 0) -> None:
        """Ignore it."""

    def item(self, what: str, done: int, total: int) -> None:
        """Keep the seconds of a plan, told as `decode.b1.plan in 3.2 s, 0.97 GB of memory`."""
        plan, how, seconds = what.split(" ")[:3]
        self.plan_seconds[plan] = float(seconds) if how == "in" else 0.0


def main() -> None:
    """Build and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("spec", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--sm", default="120")
    parser.add_argument("--entry", action="append", default=[])
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--cache", action="store_true")
    given = parser.parse_args()
    timed = Timed()
    # Loading onnx-ir and TensorRT costs the same for every size: outside of the phases that are compared.
    importlib.import_module("n3c.compiler.building.plans")
    load_trt()
    built = build(
        given.spec,
        target="trt",
        output=given.out,
        sm=given.sm,
        stages=given.stages,
        entry=given.entry,
        set=given.set,
        jobs=given.jobs,
        no_cache=not given.cache,
        progress=timed,
    )
    sizes = {file["path"].rpartition("/")[2]: file["bytes"] for file in built.files}
    audit = json.loads((given.out / "trt" / "audit.json").read_text())
    figures = {
        "emit_seconds": _sum(timed.seconds, "emit"),
        "build_seconds": _sum(timed.seconds, "build"),
        "cpu_seconds": _cpu_seconds(),
        "plan_bytes": sum(size for name, size in sizes.items() if name.endswith(".plan")),
        "peak_bytes": built.peak_rss_bytes,
        "mismatches": len(built.mismatches),
        "plans": {
            plan: {
                "seconds": timed.plan_seconds[plan],
                "bytes": sizes[plan],
                **audit["plans"][plan],
                "traffic": {key: audit["traffic"]["plans"][plan][key] for key in ("bytes", "ideal", "ratio")},
            }
            for plan in audit["plans"]
        },
    }
    print(json.dumps(figures))


def _cpu_seconds() -> float:
    """Return the processor time of this process and of those that built plans."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def _sum(seconds: dict[str, float], kind: str) -> float:
    """Return the seconds of all phases of a kind: `emit decode.b1` is one of `emit`."""
    return sum(time for phase, time in seconds.items() if phase.split(" ")[0] == kind)


if __name__ == "__main__":
    main()
