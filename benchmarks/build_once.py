"""`python -m benchmarks.build_once SPEC OUT [n3c build's options …]`: build plans and print what it took as JSON."""

from __future__ import annotations

import argparse
import importlib
import json
import time
from pathlib import Path

from n3c.backends.trt.module import load_trt
from n3c.compiler.building.driver import build
from n3c.compiler.building.request import Request
from n3c.compiler.cli.progress import TerminalProgress


class Timed(TerminalProgress):
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
        self._now, self._since, self._cpu_since = name, now, cpu

    def step(self, what: str, done: int = 0, total: int = 0) -> None:
        """Ignore it."""


def main() -> None:
    """Build and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("spec", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--sm", default="120")
    parser.add_argument("--entry", action="append", default=[])
    parser.add_argument("--set", action="append", default=[])
    given = parser.parse_args()
    timed = Timed()
    # Loading onnx-ir and TensorRT costs the same for every size: outside of the phases that are compared.
    importlib.import_module("n3c.compiler.building.plans")
    load_trt()
    sms = tuple(int(sm) for sm in given.sm.split(","))
    request = Request(given.spec, "trt", given.out, given.set, sms=sms, stages=given.stages, entries=tuple(given.entry))
    built = build(request, timed)
    sizes = {file["path"].rpartition("/")[2]: file["bytes"] for file in built.files}
    audit = json.loads((given.out / "trt" / "audit.json").read_text())
    figures = {
        "emit_seconds": _sum(timed.seconds, "emit"),
        "build_seconds": _sum(timed.seconds, "build"),
        "cpu_seconds": _sum(timed.cpu_seconds, "emit") + _sum(timed.cpu_seconds, "build"),
        "plan_bytes": sum(size for name, size in sizes.items() if name.endswith(".plan")),
        "peak_bytes": built.as_json()["peak_rss_bytes"],
        "mismatches": len(built.mismatches),
        "plans": {
            plan: {
                "cpu_seconds": timed.cpu_seconds[f"build {plan}"],
                "bytes": sizes[plan],
                **audit["plans"][plan],
                "traffic": {key: audit["traffic"]["plans"][plan][key] for key in ("bytes", "ideal", "ratio")},
            }
            for plan in audit["plans"]
        },
    }
    print(json.dumps(figures))


def _sum(seconds: dict[str, float], kind: str) -> float:
    """Return the seconds of all phases of a kind: `build decode.b1.plan` is one of `build`."""
    return sum(time for phase, time in seconds.items() if phase.split(" ")[0] == kind)


if __name__ == "__main__":
    main()
