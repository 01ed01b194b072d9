"""`python -m benchmarks.build_once SPEC OUT STAGES [KEY=VALUE …]`: build plans and print its figures as JSON."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path

from n3c.backends.trt.module import load_trt
from n3c.compiler.driver import Request, build
from n3c.compiler.progress import Progress


class Timed(Progress):
    """Progress that adds up the seconds of each phase, on the clock and of the processor, and shows nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self._now, self._since, self._cpu_since = "", time.perf_counter(), time.process_time()

    def phase(self, name: str) -> None:
        """End the last phase and begin the next."""
        now, cpu = time.perf_counter(), time.process_time()
        self.seconds[self._now] = self.seconds.get(self._now, 0.0) + now - self._since
        self.cpu_seconds[self._now] = self.cpu_seconds.get(self._now, 0.0) + cpu - self._cpu_since
        self._now, self._since, self._cpu_since = name.split(" ")[0], now, cpu

    def step(self, what: str, done: int = 0, total: int = 0) -> None:
        """Ignore it."""


def main() -> None:
    """Build and print."""
    spec, out, stages, *overrides = sys.argv[1:]
    timed = Timed()
    # Loading onnx-ir and TensorRT costs the same for every size: outside of the phases that are compared.
    importlib.import_module("n3c.compiler.engines")
    load_trt()
    built = build(Request(Path(spec), "trt", Path(out), overrides, stages=int(stages)), timed)
    figures = {
        "emit_seconds": timed.seconds["emit"],
        "build_seconds": timed.seconds["build"],
        "cpu_seconds": timed.cpu_seconds["emit"] + timed.cpu_seconds["build"],
        "plan_bytes": sum(file["bytes"] for file in built.files if file["path"].endswith(".plan")),
        "peak_bytes": built.as_json()["peak_rss_bytes"],
        "mismatches": len(built.mismatches),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
