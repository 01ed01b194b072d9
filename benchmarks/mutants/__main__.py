"""`make mutants`: change one point of the code at a time, and ask whether the tests notice.

A random sample with a seed is taken of all points of the code (points.py) and of what the templates write down
(templates.py). Each is changed in a copy of the tree and meets the tests that call its function, in a fork
(coverage.py, tree.py), the nearest and quickest first; a test that never ends notices, too. Survivors are to be judged:
a weak test, or a change that means the same; judged.toml names those with the reason, and they are drawn no more.

    python -m benchmarks.mutants --count 40 --seed 1 --seconds 1500 --coverage build/mutants/coverage

The coverage of test files that the folder lacks, or that have changed, is recorded first, which takes as long as the
tests do.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from .coverage import Coverage, record
from .points import Mutant, mutants_of
from .templates import mutants_of_template
from .tree import ROOT, Tree, import_shared

FOLDERS = ("ir", "passes", "specs", "backends", "runtime/generation")
PASSED = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
_LIMIT, _START = 8.0, 40.0
"""Times as long as the slowest took alone, and so many seconds, is what a test of a mutant may take."""


@dataclass(frozen=True)
class Chosen:
    """A plugin of pytest that runs the tests of a list, in its order, and names the one that runs in a file."""

    tests: Sequence[str]
    running: Path

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep the tests of the list."""
        order = {test: place for place, test in enumerate(self.tests)}
        items[:] = sorted((item for item in items if item.nodeid in order), key=lambda item: order[item.nodeid])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Name the test."""
        self.running.write_text(nodeid, encoding="utf-8")


class Trials:
    """A tree whose tests meet mutants, with the coverage of the tests; each mutant meets `budget` seconds of them."""

    def __init__(self, tree: Tree, coverage: Coverage, budget: float) -> None:
        self._tree = tree
        self._coverage = coverage
        self._budget = budget
        self._sound = set[str]()

    def noticed_by(self, mutant: Mutant) -> str | None:
        """Return the first test that fails with the change, or never ends; None where every test passes.

        A test that fails without the change as well says nothing: it is forgotten, and the others are run.
        """
        changed = mutant.change.applied((ROOT / mutant.path).read_text(encoding="utf-8"))
        while True:
            with self._tree.changed(mutant.path, changed):
                test = self._first_failure(self._coverage.of_mutant(mutant, self._budget))
            if test is None or test in self._sound or self._first_failure([test]) is None:
                self._sound |= {test} if test else set()
                return test
            print(f"fails without a change: {test}", flush=True)
            self._coverage.drop(test)

    def _first_failure(self, tests: Sequence[str]) -> str | None:
        """Return the test that fails or never ends; the first one where its file cannot be imported."""
        for part in self._coverage.in_parts(tests):
            files = list(dict.fromkeys(test.partition("::")[0] for test in part))
            running = self._tree.running
            running.write_text(part[0], encoding="utf-8")
            limit = _START + _LIMIT * max(self._coverage.seconds[test] for test in part)
            if self._tree.pytest(files, Chosen(part, running), limit) not in PASSED:
                return running.read_text(encoding="utf-8")
        return None


def points() -> list[Mutant]:
    """Return every mutant of the code and of the templates that is not known to mean the same."""
    judged, found = equivalent(), list[Mutant]()
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            found += mutants_of(ROOT, path)
        for path in sorted((ROOT / folder).rglob("*.jinja")):
            found += mutants_of_template(ROOT, path)
    return [mutant for mutant in found if not is_judged(mutant, judged)]


def equivalent() -> set[tuple[str, str]]:
    """Return path and description, without its line, of the changes that judged.toml tells to mean the same."""
    entries = tomllib.loads(Path(__file__).with_name("judged.toml").read_text(encoding="utf-8"))["equivalent"]
    return {(entry["path"], entry["change"]) for entry in entries}


def is_judged(mutant: Mutant, judged: set[tuple[str, str]]) -> bool:
    """Whether a change is one of those."""
    files = {path for path, _ in judged}
    if mutant.path not in files:
        return False
    described = mutant.described((ROOT / mutant.path).read_text(encoding="utf-8"))
    return (mutant.path, described.partition(": ")[2]) in judged


def files_of(tests: Sequence[str]) -> list[str]:
    """Return the files of tests in folders, and those that are named."""
    files: list[Path] = []
    for place in (ROOT / test for test in tests):
        files += sorted(place.rglob("test_*.py")) if place.is_dir() else [place]
    return [str(file.relative_to(ROOT)) for file in files]


def main() -> None:
    """Take a sample, and print the survivors and the score by folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=7200, help="of the whole run")
    parser.add_argument("--budget", type=float, default=30, help="seconds of tests that a mutant meets")
    parser.add_argument("--coverage", type=Path, default=ROOT / "build/mutants/coverage", metavar="FOLDER")
    parser.add_argument("--tests", nargs="*", default=["tests"], help="files or folders whose coverage is recorded")
    options = parser.parse_args()
    import_shared()
    with tempfile.TemporaryDirectory(prefix="n3c-mutants-") as folder:
        tree = Tree(Path(folder))
        coverage = record(tree, files_of(options.tests), options.coverage.resolve(), limit=1800)
        sample = random.Random(options.seed).sample(points(), options.count)
        trials, verdicts = Trials(tree, coverage, options.budget), dict[Mutant, str | None]()
        end = time.monotonic() + options.seconds
        for mutant in sample:
            started = time.monotonic()
            if started > end:
                break
            verdicts[mutant] = test = trials.noticed_by(mutant)
            described = mutant.described((ROOT / mutant.path).read_text(encoding="utf-8"))
            verdict = f"noticed by {test}" if test else "SURVIVES"
            print(f"{len(verdicts)}: {described}\n    {verdict} ({time.monotonic() - started:.1f} s)", flush=True)
    print(json.dumps({"seed": options.seed} | scores(verdicts), indent=1))


def scores(verdicts: dict[Mutant, str | None]) -> dict[str, object]:
    """Return how many mutants of each folder were tried and noticed, and of all."""

    def folder(mutant: Mutant) -> str:
        parent = mutant.path.split("/")[0]
        return "templates" if mutant.path.endswith(".jinja") else parent

    tried = Counter(folder(mutant) for mutant in verdicts)
    noticed = Counter(folder(mutant) for mutant, test in verdicts.items() if test is not None)
    by_folder = {name: {"tried": tried[name], "noticed": noticed[name]} for name in sorted(tried)}
    return {"tried": tried.total(), "noticed": noticed.total(), "folders": by_folder}


if __name__ == "__main__":
    main()
