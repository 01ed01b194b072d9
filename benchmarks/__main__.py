"""`python -m benchmarks [NAME …] [--quick]`: print machine and versions, and then the tables, as Markdown.

`python -m benchmarks gpu` is a program of its own: `benchmarks/gpu/run.py`.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from .machine import describe, load_note
from .registry import BENCHMARKS


def main() -> None:
    """Run the named benchmarks, or all."""
    if sys.argv[1:2] == ["gpu"]:
        from .gpu.run import main as gpu

        gpu(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure n3c.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"which to run: {', '.join(BENCHMARKS)} (default: all)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer runs and smaller models: to try it out")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    print("\n".join(describe()), flush=True)
    for name in arguments.names or BENCHMARKS:
        module = importlib.import_module(BENCHMARKS[name])
        print(f"\n## {module.TITLE}\n", flush=True)
        for line in module.run(arguments.quick):
            print(line, flush=True)
        print(f"\n{load_note()}", flush=True)


if __name__ == "__main__":
    main()
