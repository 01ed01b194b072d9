"""`python -m benchmarks.ablations`: train every arm with every seed, and write docs/ablations.md with its plots."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..machine import describe
from .arms import questions
from .report import report
from .runs import Length, run_all

DOCS = Path(__file__).parents[2] / "docs"


def main() -> None:
    """Run what is missing in --runs, and write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablations", description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, each on one thread")
    parser.add_argument("--runs", type=Path, default=Path("build/ablations"), help="where runs are kept")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where ablations.md and images/ are written")
    arguments = parser.parse_args()
    length = Length(arguments.steps)
    asked = questions()
    arms = {arm.name: arm for question in asked for arm in question.arms}
    runs = run_all(list(arms.values()), arguments.seeds, length, arguments.runs, arguments.jobs)
    for path, content in report(asked, runs, length, list(describe())).items():
        file: Path = arguments.docs / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")
        print(file)


if __name__ == "__main__":
    main()
