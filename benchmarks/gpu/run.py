"""`python -m benchmarks gpu [NAME …] [--budget SECONDS]`: every piece of evidence that a GPU can give, in order.

Each part is a process with a time limit of its own and prints rows as it knows them, so a part that is stopped keeps
what it has shown. `gpu.json` and `gpu.md` are written again after every part. It needs torch, Triton and transformers
beside what n3c imports, but not n3c installed: a checkout with `typings` on PYTHONPATH is enough.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .page import page
from .part import Setting

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Part:
    """A part: a module of this folder, and the seconds that it may take."""

    module: str
    seconds: int


PARTS: Mapping[str, Part] = {
    "ceilings": Part("ceilings", 30),
    "plans": Part("tensorrt_plans", 60),
    "engine_parity": Part("engine_parity", 180),
    "training_parity": Part("training_parity", 90),
    "commands": Part("commands", 300),
    "kernels": Part("kernels", 90),
    "time_model": Part("time_model", 90),
    "decode": Part("decode", 150),
    "speculation": Part("speculation", 90),
    "batching": Part("batching", 150),
    "prefill": Part("prefill", 90),
    "train": Part("train", 120),
    "scan": Part("scan", 120),
}
"""Name → part, in the order in which they run: what decides most comes first.

A fault of a kernel ends all that its process does on a GPU, so engine and training are parts of their own.
"""


def main(arguments: Sequence[str]) -> None:
    """Run the named parts, or all, until the budget is spent; say what was skipped."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description="Collect what a GPU shows.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which to run: {', '.join(PARTS)} (default: all)")
    parser.add_argument("--budget", type=float, default=900, metavar="SECONDS", help="stop after so long (900)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only to try the parts out")
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU manages")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder of gpu.json and gpu.md (build/gpu)")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.names if name not in PARTS]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if lacking := _lacking(given.device):
        parser.exit(4, f"{parser.prog}: {lacking}\n")
    given.out.mkdir(parents=True, exist_ok=True)
    setting, end = Setting(given.device, given.tiny), time.monotonic() + given.budget
    report: dict[str, Any] = {"about": about(given.device), "setting": asdict(setting), "parts": {}}
    for name in given.names or PARTS:
        left = end - time.monotonic()
        part = PARTS[name]
        report["parts"][name] = (
            run_part(part, setting, min(part.seconds, left))
            if left > 1
            else {"rows": [], "skipped": f"the budget of {given.budget:g} s is spent"}
        )
        (given.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (given.out / "gpu.md").write_text(page(report), encoding="utf-8")
        print("\n".join(page({**report, "parts": {name: report["parts"][name]}}).splitlines()[-60:]), flush=True)


def _lacking(device: str) -> str:
    """Return what this machine has not, of what every part needs; nothing where it has all."""
    try:
        import torch
    except ImportError:
        return "PyTorch is not installed"
    if device == "cuda" and not torch.cuda.is_available():
        return "PyTorch finds no GPU; `--device cpu --tiny` tries the parts out"
    return ""


def run_part(part: Part, setting: Setting, seconds: float) -> dict[str, Any]:
    """Run a part in a process; return its rows, its time and, where it did not end well, why."""
    command = [sys.executable, "-m", f"benchmarks.gpu.{part.module}", json.dumps(asdict(setting))]
    paths = [str(ROOT / "typings"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    if setting.device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    start = time.monotonic()
    out, err, code = printed(command, environment, seconds)
    problem = ""
    if code is None:
        problem = f"stopped after {seconds:.0f} s"
    elif code:
        problem = (err.strip().splitlines() or ["no message"])[-1][:500]
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{") and line.endswith("}")]
    return {"rows": rows, "seconds": round(time.monotonic() - start, 1)} | ({"problem": problem} if problem else {})


def printed(command: Sequence[str], environment: Mapping[str, str], seconds: float) -> tuple[str, str, int | None]:
    """Return what a command prints and its exit code; None where it is stopped, with all that it has started."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    try:
        return *process.communicate(timeout=seconds), process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its own children would hold what it prints open
        return *process.communicate(), None


def about(device: str) -> dict[str, str]:
    """Return card, driver, versions, date and commit."""
    import torch

    found = {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "commit": _commit(),
        "python": platform.python_version(),
    }
    found["torch"] = torch.__version__
    for name in ("triton", "transformers", "mamba_ssm"):
        try:
            found[name] = __import__(name).__version__
        except (ImportError, AttributeError):
            found[name] = "not installed"
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        found["card"] = (
            f"{card.name}, SM {card.major}.{card.minor}, {card.multi_processor_count} multiprocessors, "
            f"{card.total_memory / 1e9:.1f} GB"
        )
        found["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found


def _commit() -> str:
    return _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD") or os.environ.get("N3C_COMMIT", "unknown")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
