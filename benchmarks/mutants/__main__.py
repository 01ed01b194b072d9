"""`make mutants`: change one point of the code at a time, and ask whether the tests notice.

A random sample with a seed is taken of all points of the code (points.py) and of what the templates write down
(templates.py). Each is changed in a copy of the tree and meets the tests that call its function, in a fork
(coverage.py, tree.py). Tests that take longer than the limit decide nothing, and are counted apart. Survivors
are to be judged: a weak test, or a change that means the same; judged.toml names those with the reason, and they are
drawn no more.

    python -m benchmarks.mutants --count 40 --seed 1 --seconds 1500 --coverage build/mutants/coverage

The coverage of test files that the folder lacks is recorded first, which takes as long as the tests do: remove the
folder when the code has changed.
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
_LIMIT = 8.0
"""Times as long as they took alone is what tests of a mutant may take."""


@dataclass(frozen=True)
class Chosen:
    """A plugin of pytest that runs the tests of a list, in its order."""

    tests: Sequence[str]

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep the tests of the list."""
        order = {test: place for place, test in enumerate(self.tests)}
        items[:] = sorted((item for item in items if item.nodeid in order), key=lambda item: order[item.nodeid])


def survives(mutant: Mutant, tree: Tree, coverage: Coverage, budget: float) -> bool | None:
    """Whether every test passes with the change; None where they take too long."""
    tests = coverage.of_mutant(mutant, budget)
    if not tests:
        return True
    with tree.changed(mutant.path, mutant.change.applied((ROOT / mutant.path).read_text(encoding="utf-8"))):
        for part in coverage.in_parts(tests):
            files = list(dict.fromkeys(test.partition("::")[0] for test in part))
            code = tree.pytest(files, Chosen(part), limit=60 + _LIMIT * sum(coverage.seconds[test] for test in part))
            if code != pytest.ExitCode.OK:
                return None if code is None else False
    return True


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
    parser.add_argument("--budget", type=float, default=60, help="seconds of tests that a mutant meets")
    parser.add_argument("--coverage", type=Path, default=ROOT / "build/mutants/coverage", metavar="FOLDER")
    parser.add_argument("--tests", nargs="*", default=["tests"], help="files or folders whose coverage is recorded")
    options = parser.parse_args()
    import_shared()
    with tempfile.TemporaryDirectory(prefix="n3c-mutants-") as folder:
        tree = Tree(Path(folder))
        coverage = record(tree, files_of(options.tests), options.coverage.resolve(), limit=1800)
        sample = random.Random(options.seed).sample(points(), options.count)
        end = time.monotonic() + options.seconds
        verdicts: dict[Mutant, bool | None] = {}
        for mutant in sample:
            if time.monotonic() > end:
                break
            verdicts[mutant] = verdict = survives(mutant, tree, coverage, options.budget)
            if verdict is not False:
                described = mutant.described((ROOT / mutant.path).read_text(encoding="utf-8"))
                print(f"{'survives' if verdict else 'undecided'} (of {len(verdicts)}): {described}", flush=True)
    print(json.dumps({"seed": options.seed} | scores(verdicts), indent=1))


def scores(verdicts: dict[Mutant, bool | None]) -> dict[str, object]:
    """Return how many mutants of each folder were tried, noticed and left undecided, and of all."""

    def folder(mutant: Mutant) -> str:
        parent = mutant.path.split("/")[0]
        return "templates" if mutant.path.endswith(".jinja") else parent

    tried = Counter(folder(mutant) for mutant in verdicts)
    noticed = Counter(folder(mutant) for mutant, verdict in verdicts.items() if verdict is False)
    undecided = Counter(folder(mutant) for mutant, verdict in verdicts.items() if verdict is None)
    by_folder = {name: {"tried": tried[name], "noticed": noticed[name], "undecided": undecided[name]}
                 for name in sorted(tried)}  # fmt: skip
    return {"tried": tried.total(), "noticed": noticed.total(), "undecided": undecided.total(), "folders": by_folder}


if __name__ == "__main__":
    main()
