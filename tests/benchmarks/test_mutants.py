"""`make mutants`: what it changes in code and in templates, and which tests it runs."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def part(name: str) -> Any:
    """Import a module of the driver, which is beside the packages that are installed."""
    sys.path.insert(0, str(ROOT))
    try:
        return importlib.import_module(f"benchmarks.mutants.{name}")
    finally:
        sys.path.remove(str(ROOT))


Calls, names_of, Coverage = part("calls").Calls, part("calls").names_of, part("coverage").Coverage
Change, Mutant, changes_of, mutants_of = (
    getattr(part("points"), name) for name in ("Change", "Mutant", "changes_of", "mutants_of")
)
mutants_of_template, driver = part("templates").mutants_of_template, part("__main__")
scores = driver.scores


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("a < b\n", ["a <= b"]),
        ("a not in b and not c\n", ["a in b and not c", "a not in b or not c", "a not in b and c"]),
        ("1 <= a < 3\n", ["2 <= a < 3", "1 < a < 3", "1 <= a <= 3", "1 <= a < 4"]),
        ("(a) * (b + 2.5)\n", ["(a) / (b + 2.5)", "(a) * (b - 2.5)", "(a) * (b + 3.5)"]),
        ("x = 1 if f(a) else -2\n", ["x = 2 if f(a) else -2", "x = 1 if (not f(a)) else -2",
                                     "x = 1 if f(a) else 2", "x = 1 if f(a) else -3"]),
        ("ä = 'ö' + b - True\n", ["ä = 'ö' + b + True", "ä = 'ö' + b - False"]),
        ("def f(a: 1 = 0) -> 2:\n    return f'{a + 1}'\n", ["def f(a: 1 = 1) -> 2:\n    return f'{a + 1}'"]),
        ("@dataclass(frozen=True)\nclass A: ...\nzip(a, b, strict=False, c=True)\n",
         ["@dataclass(frozen=True)\nclass A: ...\nzip(a, b, strict=False, c=False)"]),
    ],
)  # fmt: skip
def test_the_changes_of_a_text(text: str, changed: list[str]) -> None:
    found = [change.applied(text).removesuffix("\n") for change in changes_of(text)]
    assert sorted(found) == sorted(changed)


def test_the_function_around_a_change() -> None:
    """Its name is the one that its code object has."""
    text = "A = 1\n@b(2)\ndef f():\n    return 3\n\nclass C:\n    x = 4\n    def m(self):\n        def g(): return 5\n"
    assert {text[change.start]: change.function for change in changes_of(text)} == {
        "1": "<module>", "2": "f", "3": "f", "4": "<module>", "5": "C.m.<locals>.g",
    }  # fmt: skip


TEMPLATE = '''{# 1 + 1 #}
{% if a == 2 %}
def f(x):
    """The sum of 1 and 2."""
    y = x * {{ size + 3 }}  # not 4
{% endif %}
    if x:
        return [
            y + 5,
        ]
    return y

LIMIT = {{ limit }} + 6
'''


def test_the_statements_of_a_template(tmp_path: Path) -> None:
    """Jinja's own expressions, comments and docstrings are left alone."""
    path = tmp_path / "a.py.jinja"
    path.write_text(TEMPLATE, encoding="utf-8")
    mutants = mutants_of_template(tmp_path, path)
    assert [mutant.described(TEMPLATE).partition(": ")[2] for mutant in mutants] == [
        "y = x [* → /] {{ size + 3 }}  # not 4",
        "if [x → (not x)]:",
        "y [+ → -] 5,",
        "y + [5 → 6],",
        "LIMIT = {{ limit }} [+ → -] 6",
        "LIMIT = {{ limit }} + [6 → 7]",
    ]
    assert [(mutant.line, mutant.change.function) for mutant in mutants] == [
        (5, "f"), (7, "f"), (9, "f"), (9, "f"), (13, "<module>"), (13, "<module>"),
    ]  # fmt: skip


def test_a_mutant_meets_the_tests_of_its_function() -> None:
    """Its folder's tests come first, and what else stands in their files last; a budget cuts the list."""
    callers = ["tests/compiler/test_api.py::a", "tests/ir/test_ops.py::b", "tests/ir/test_verify.py::c"]
    seconds = dict(zip(callers, (1.0, 3.0, 2.0), strict=True)) | {"tests/ir/test_ops.py::d": 1.0, "other.py::e": 0.1}
    coverage = Coverage(seconds, {"ir/ops.py:f": callers})
    mutant = Mutant("ir/ops.py", 9, Change(0, 1, "", "f"))
    ordered = [callers[1], callers[2], callers[0], "tests/ir/test_ops.py::d"]
    assert coverage.of_mutant(mutant, 100) == ordered
    assert coverage.of_mutant(mutant, 5.5) == ordered[:2]
    assert coverage.of_mutant(mutant, 0) == ordered[:1]
    outside = Mutant("ir/ops.py", 1, Change(0, 1, "", "<module>"))
    assert coverage.of_mutant(outside, 100) == ordered
    assert coverage.of_mutant(Mutant("ir/types.py", 1, Change(0, 1, "", "f")), 100)[0] == ordered[3]  # of the folder


def test_another_test_comes_before_slow_cases_of_one() -> None:
    """Quick cases all come first: a case each of a condition, say."""
    seconds = {f"a.py::{test}": float(took) for test, took in
               {"a[1]": 0.1, "a[2]": 0.1, "b[1]": 2, "b[2]": 2.1, "b[3]": 2.2, "c": 5}.items()}  # fmt: skip
    coverage = Coverage(seconds, {"ir/ops.py:f": list(seconds)})
    ordered = coverage.of_mutant(Mutant("ir/ops.py", 9, Change(0, 1, "", "f")), 100)
    assert [test.partition("::")[2] for test in ordered] == ["a[1]", "a[2]", "b[1]", "b[2]", "c", "b[3]"]


class StandInForRecording:
    """A tree of one test, which passes, or is skipped, and how often it ran."""

    def __init__(self, folder: Path) -> None:
        self.folder = self.root = folder
        self.ran, self.skips = 0, False

    def pytest(self, arguments: list[str], recorder: Any, limit: float) -> int:
        self.ran += 1
        outcome = "skipped" if self.skips else "passed"
        recorder.pytest_runtest_logreport(SimpleNamespace(nodeid="t", duration=1, outcome=outcome))
        recorder._names["t"] = {"ir/ops.py:f"}
        recorder.pytest_sessionfinish()
        return 0


def test_a_recording_holds_as_long_as_its_tests_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of no test is none: it was skipped for a reason that may be gone."""
    recording = part("coverage")
    monkeypatch.setattr(recording, "ROOT", tmp_path)
    file, tree = tmp_path / "test_a.py", StandInForRecording(tmp_path)
    found: list[tuple[int, dict[str, list[str]]]] = []
    for text, skips in (("1", True), ("1", False), ("1", False), ("2", False)):
        file.write_text(text)
        tree.skips = skips
        coverage = recording.record(tree, ["test_a.py"], tmp_path / "recorded", 9)
        found.append((tree.ran, coverage.tests))
    assert found == [(1, {}), *((ran, {"ir/ops.py:f": ["t"]}) for ran in (2, 2, 3))]
    assert len(list((tmp_path / "recorded").iterdir())) == 1


def test_text_of_a_template_is_not_what_notices() -> None:
    golden, other = "tests/backends/torch/test_emit.py::test_golden", "tests/backends/torch/test_numerics.py::x"
    tests = {"model.py::forward": [golden, other], "tests/support/golden.py:assert_golden": [golden]}
    coverage = Coverage({golden: 1.0, other: 1.0}, tests)
    mutant = Mutant("backends/torch/templates/package/model.py.jinja", 9, Change(0, 1, "", "forward"))
    assert coverage.of_mutant(mutant, 100) == [other]


def test_the_names_of_functions() -> None:
    """n3c is imported by links; a generated package lies anywhere; what others wrote has no name."""
    files = ("/t/import/n3c/ir/ops.py", "/t/tests/support/a.py", "/tmp/x/model.py", "/v/site-packages/b.py", "<string>")
    modules = [compile("\n\ndef f(): ...", file, "exec") for file in files]
    codes = [constant for module in modules for constant in module.co_consts if isinstance(constant, CodeType)]
    assert names_of(codes, Path("/t")) == {"ir/ops.py:f", "tests/support/a.py:f", "model.py::f"}


def test_calls_of_every_thread() -> None:
    """From `start()` to `take()`, in this thread and in those that it starts."""
    calls = Calls()

    def before() -> None: ...

    def here() -> None: ...

    def there() -> None:
        here()

    before()
    calls.start()
    thread = threading.Thread(target=there)
    thread.start()
    thread.join()
    first = {code.co_name for code in calls.take()}
    before()
    calls.start()
    here()
    assert {"here", "there"} <= first and "before" not in first
    assert "here" in {code.co_name for code in calls.take()} and not calls.take()


def test_the_first_tests_are_few() -> None:
    """They are of two files at most, or take five seconds; what most mutants do not survive is quick."""
    tests = ["a.py::1", "a.py::2", "b.py::1", "c.py::1", "a.py::3"]
    quick = Coverage(dict.fromkeys(tests, 0.1))
    assert quick.in_parts(tests) == [tests[:3], tests[3:]]
    assert quick.in_parts(tests[:3]) == [tests[:3]]
    slow = Coverage(dict.fromkeys(tests, 3.0))
    assert slow.in_parts(tests) == [tests[:1], tests[1:]]


def test_scores() -> None:
    path = "backends/torch/templates/config.jinja"
    mutants = [Mutant(name, 1, Change(0, 1, "", "f")) for name in ("ir/a.py", "ir/b.py", path)]
    found = scores(dict(zip(mutants, ("test", None, None), strict=True)))
    assert (found["tried"], found["noticed"]) == (3, 1)
    assert found["folders"] == {"ir": {"tried": 2, "noticed": 1}, "templates": {"tried": 1, "noticed": 0}}


class StandInForTree:
    """Tests that fail with a change, always, or not at all, by their name."""

    def __init__(self, folder: Path) -> None:
        self.running = folder / "running.txt"
        self.is_changed = False

    @contextlib.contextmanager
    def changed(self, path: str, text: str) -> Generator[None]:
        self.is_changed = True
        yield
        self.is_changed = False

    def pytest(self, files: list[str], chosen: Any, limit: float) -> int | None:
        for test in chosen.tests:
            chosen.pytest_runtest_logstart(test)
            if "broken" in test or (self.is_changed and "fails" in test):
                return 1
            if self.is_changed and "hangs" in test:
                return None
        return 0


@pytest.mark.parametrize(
    ("tests", "noticed_by"),
    [(["a", "b fails", "c fails"], "b fails"), (["a"], None), ([], None), (["a hangs"], "a hangs"),
     (["a broken", "b fails"], "b fails"), (["a broken", "b"], None)],
)  # fmt: skip
def test_who_notices(tests: list[str], noticed_by: str | None, tmp_path: Path) -> None:
    """A test notices where it fails, or never ends, with the change alone."""
    coverage = Coverage(dict.fromkeys(tests, 0.1), {"ir/ops.py:shape": tests})
    trials = driver.Trials(StandInForTree(tmp_path), coverage, 60)
    assert trials.noticed_by(Mutant("ir/ops.py", 1, Change(0, 1, "", "shape"))) == noticed_by


def test_every_file_of_the_code_has_mutants_that_are_python() -> None:
    for path in sorted((ROOT / "ir").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        for mutant in mutants_of(ROOT, path)[:5]:
            compile(mutant.change.applied(text), str(path), "exec")


def test_what_was_judged_is_still_there_and_drawn_no_more() -> None:
    judged = driver.equivalent()
    found: set[tuple[str, str]] = set()
    for name in {path for path, _ in judged}:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        mutants = (mutants_of_template if path.suffix == ".jinja" else mutants_of)(ROOT, path)
        found |= {
            (name, mutant.described(text).partition(": ")[2]) for mutant in mutants if driver.is_judged(mutant, judged)
        }
    assert found == judged


@pytest.mark.parametrize(("began", "takes", "code"), [(100, 0.2, 7), (0, 60, None)])
def test_a_test_that_never_ends(began: float, takes: float, code: int | None, tmp_path: Path) -> None:
    """It ends when its time is over, which begins anew with each test: in the future here, for one that has time."""
    running = tmp_path / "running"
    running.touch()
    os.utime(running, times=(0, time.time() + began))

    def work() -> int:
        time.sleep(takes)
        return 7

    assert part("tree")._forked(work, tmp_path / "output", running, 0.1) == code
