"""Which tests call which function: recorded once, and asked for each mutant."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from .calls import FILE_OF_CALLS, Calls, names_of
from .points import MODULE, Mutant
from .tree import ROOT, Tree

_TEMPLATES = "backends/torch/templates/"
_EMIT = "backends/torch/emit.py"
_GOLDEN = "tests/support/golden.py"
FIXTURES = "_fixtureinfo"
"""The attribute of a test that has its fixtures: pytest tells them no other way."""
_FIRST_SECONDS, _FIRST_FILES = 5.0, 2


@dataclass
class Coverage:
    """The tests that pass, with their seconds, and the tests of each function by its name (`names_of`)."""

    seconds: dict[str, float] = field(default_factory=dict)
    tests: dict[str, list[str]] = field(default_factory=dict)

    def add(self, other: Coverage) -> None:
        """Take up the tests of other files."""
        self.seconds |= other.seconds
        for name, tests in other.tests.items():
            self.tests.setdefault(name, []).extend(tests)

    def write(self, path: Path) -> None:
        """Write it to a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"seconds": self.seconds, "tests": self.tests}), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Coverage:
        """Read what `write` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def drop(self, test: str) -> None:
        """Forget a test."""
        del self.seconds[test]
        for tests in self.tests.values():
            if test in tests:
                tests.remove(test)

    def of_mutant(self, mutant: Mutant, budget: float) -> list[str]:
        """Return the tests to run, those of the file's own folder first, `budget` seconds of them and one at least.

        These are the tests that call the function, and then the others of their files: a value that the first test
        of a file computes is one that others look at. Quick ones come first; the second case of a test counts as twice
        as slow, the third as three times: another test shows more. A change of a template is to be noticed in what
        the code does: tests that call `assert_golden` are left out.
        """
        callers = self._callers(mutant)
        files = {_file(test) for test in callers}
        beside = {test for test in self.seconds if _file(test) in files} - callers
        if mutant.path.startswith(_TEMPLATES):
            golden = self._of(lambda name: name.startswith(f"{_GOLDEN}:"))
            callers, beside = callers - golden, beside - golden
        ordered = [*self._ordered(callers, mutant.path), *self._ordered(beside, mutant.path)]
        chosen: list[str] = []
        for test in ordered:
            if self.seconds[test] <= budget:
                chosen.append(test)
                budget -= self.seconds[test]
        return chosen or ordered[:1]

    def in_parts(self, tests: Sequence[str]) -> list[list[str]]:
        """Return the tests of an order in two parts: those of the first files, which take a moment, and the others.

        Most mutants end with the first part, and no other file is imported for them.
        """
        seconds, files, place = 0.0, set[str](), 0
        for place, test in enumerate(tests):
            seconds += self.seconds[test]
            files.add(_file(test))
            if place and (seconds > _FIRST_SECONDS or len(files) > _FIRST_FILES):
                return [list(tests[:place]), list(tests[place:])]
        return [list(tests)] if tests else []

    def _callers(self, mutant: Mutant) -> set[str]:
        """Return the tests of the function around; of the whole file where there is none, or of the file's folder."""
        if mutant.path.startswith(_TEMPLATES):
            return self._callers_of_template(mutant)
        name = f"{mutant.path}:{mutant.change.function}"
        own = self._of(lambda other: other == name) or self._of(lambda other: other.startswith(f"{mutant.path}:"))
        return own or {test for test in self.seconds if Path(_file(test)).parent == _mirror(mutant.path)}

    def _callers_of_template(self, mutant: Mutant) -> set[str]:
        """Return the tests of the function in the file that the template makes, or of one of that name in any."""
        file, ends = Path(mutant.path.removesuffix(".jinja")).name, f"::{mutant.change.function}"
        name = f"{file}{ends}"
        if mutant.change.function == MODULE:
            return self._of(lambda other: other.startswith(f"{file}::")) or self._of(
                lambda other: other.startswith(_EMIT)
            )
        return self._of(lambda other: other == name) or self._of(lambda other: other.endswith(ends))

    def _of(self, named: Callable[[str], bool]) -> set[str]:
        return {test for name, tests in self.tests.items() if named(name) for test in tests
                if not name.endswith(f":{MODULE}")}  # fmt: skip

    def _ordered(self, tests: Iterable[str], path: str) -> list[str]:
        stem = f"_{Path(path).name.partition('.')[0]}"

        def near(test: str) -> int:
            file = Path(_file(test))
            return 0 if file.stem.endswith(stem) else 1 if file.is_relative_to(_mirror(path)) else 2

        cases, cost = Counter[str](), dict[str, float]()
        for test in sorted(tests, key=lambda test: (self.seconds[test], test)):
            function = test.partition("[")[0]
            cases[function] += 1
            cost[test] = self.seconds[test] * cases[function]
        return sorted(tests, key=lambda test: (near(test), cost[test], test))


def record(tree: Tree, files: Sequence[str], folder: Path, limit: float) -> Coverage:
    """Run each test file in a fork, note in `folder` what every test that passes calls, and return it all.

    A file that has been recorded is run again when its text is another, or when no test of it has passed.
    """
    coverage = Coverage()
    for file in files:
        name, text = file.replace("/", "."), (ROOT / file).read_bytes()
        out = folder / f"{name}.{hashlib.sha256(text).hexdigest()[:12]}.json"
        if not out.is_file():
            for earlier in folder.glob(f"{name}.*json"):
                earlier.unlink()
            started = time.monotonic()
            code = tree.pytest(["--maxfail=1000", file], Recorder(tree, out), limit)
            passed = len(Coverage.read(out).seconds) if out.is_file() else 0
            took = f"{time.monotonic() - started:.0f} s"
            print(f"{file}: {passed} tests recorded in {took}, pytest's code {code}", flush=True)
        if out.is_file():
            coverage.add(Coverage.read(out))
    return coverage


class Recorder:
    """A plugin of pytest that writes a `Coverage` of the tests that pass to a file.

    What is called while a file is imported, or a fixture of several tests is made, counts for each of them.
    """

    def __init__(self, tree: Tree, out: Path) -> None:
        self._tree = tree
        self._out = out
        self._calls = Calls()
        self._passed: dict[str, float] = {}
        self._failed: set[str] = set()
        self._names: dict[str, set[str]] = {}
        self._imported: set[str] = set()
        self._fixtures: dict[object, set[str]] = {}
        os.environ.pop(FILE_OF_CALLS, None)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self) -> None:
        """Note what importing the files calls."""
        self._calls.start()

    def pytest_collection_finish(self) -> None:
        """End the imports."""
        self._imported = self._taken()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Note what a test and its fixtures call."""
        os.environ[FILE_OF_CALLS] = str(self._tree.folder / "called.txt")
        self._calls.start()
        result = yield
        names = self._taken() | self._imported
        info: Mapping[str, Sequence[object]] = getattr(item, FIXTURES).name2fixturedefs
        for definitions in info.values():
            for definition in definitions:
                names |= self._fixtures.get(definition, set())
        self._names[item.nodeid] = names
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Generator[None, object, object]:
        """Note what a fixture of several tests calls, for all of them."""
        if fixturedef.scope == "function":
            return (yield)
        outside = self._taken()
        self._calls.start()
        result = yield
        self._fixtures.setdefault(fixturedef, set()).update(self._taken() | outside)
        self._calls.start()
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note how long a test took, and whether it passed."""
        self._passed[report.nodeid] = self._passed.get(report.nodeid, 0) + report.duration
        if report.outcome != "passed":
            self._failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        """Write what was noted, if a test has passed."""
        coverage = Coverage({test: round(time, 3) for test, time in self._passed.items() if test not in self._failed})
        for test in coverage.seconds:
            for name in self._names[test]:
                coverage.tests.setdefault(name, []).append(test)
        if coverage.seconds:
            coverage.write(self._out)

    def _taken(self) -> set[str]:
        """Return the names of what was called since the calls were noted, and note no more."""
        names = names_of(self._calls.take(), self._tree.root)
        started = self._tree.folder / "called.txt"
        if started.is_file():
            names |= set(started.read_text(encoding="utf-8").split("\n")) - {""}
            started.unlink()
        return names


def _mirror(path: str) -> Path:
    """Return the folder of tests that mirrors a file's own, or the nearest of those around it."""
    return next(Path("tests") / parent for parent in Path(path).parents if (ROOT / "tests" / parent).is_dir())


def _file(test: str) -> str:
    return test.partition("::")[0]
