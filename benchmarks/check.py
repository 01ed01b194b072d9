"""How long `n3c check` takes against starting Python with what every command line in it needs."""

from __future__ import annotations

import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

TITLE = "`n3c check`"

SPECS = Path(__file__).parents[1] / "specs"
N3C = str(Path(sysconfig.get_path("scripts")) / "n3c")
PEER = (sys.executable, "-c", "import click, tomllib")


def run(quick: bool) -> Iterator[str]:
    """Yield the table: medians of interleaved runs, and ratios to the peer."""
    runs = 5 if quick else 21
    commands = {
        'python -c "import click, tomllib" (peer)': PEER,
        "n3c check specs/super.toml": (N3C, "check", str(SPECS / "super.toml")),
        "n3c check specs/ultra.toml": (N3C, "check", str(SPECS / "ultra.toml")),
        "n3c --help": (N3C, "--help"),
    }
    for command in commands.values():
        _seconds(command)  # compiles modules, fills the page cache
    rounds = [{name: _seconds(command) for name, command in commands.items()} for _ in range(runs)]
    medians = {name: statistics.median(r[name] for r in rounds) for name in commands}
    peer = next(iter(medians.values()))
    yield f"Wall time, median of {runs} interleaved runs; aim: at most 3 times the peer.\n"
    yield "| command | ms | fastest | times the peer |"
    yield "|---|---:|---:|---:|"
    for name, median in medians.items():
        fastest = min(r[name] for r in rounds)
        yield f"| `{name}` | {1e3 * median:.0f} | {1e3 * fastest:.0f} | {median / peer:.2f} |"


def _seconds(command: Sequence[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start
