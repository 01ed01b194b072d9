"""Processes that build plans: several at once, and what happens where one does not end well. With a stand-in."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from n3c.backends import machine
from n3c.backends.trt import builders
from n3c.backends.trt.builder_process import Order, Step
from n3c.backends.trt.builders import Builders
from n3c.ir.diagnostics import ExitCode, N3CError, Span
from support.fake_tensorrt_module import install_stand_in
from support.processes import alive, children

SPAN = Span("m.toml", 3, 5)


@pytest.fixture(autouse=True)
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "modules"
    folder.mkdir()
    install_stand_in(folder, monkeypatch)


def order(folder: Path, name: str, model: bytes = b"onnx", sm: int = 90, memory: int = 0) -> Order:
    path = folder / f"{name}.onnx"
    path.write_bytes(model)
    return Order(path, folder / f"{name}.plan", "full", (sm,), {}, {"layer": SPAN}, memory)


def ignored(_: Mapping[str, Step]) -> None:
    """Nobody looks at steps."""


def test_what_takes_most_memory_is_built_first(tmp_path: Path) -> None:
    with Builders(1) as running:
        for name, size in (("first", 1), ("small", 2), ("large", 99)):
            running.order(order(tmp_path, name, memory=size))
        built = list(running.results(ignored))
    assert {plan.path.name for plan in built} == {"first.plan", "small.plan", "large.plan"}
    assert built.index(next(p for p in built if p.path.stem == "large")) < 2  # only what had begun came before it
    assert all(plan.path.read_bytes() == b"engine!" and plan.scratch_bytes == 512 for plan in built)
    assert [kernel.name for kernel in built[0].kernels] == ["k0"]
    assert (built[0].peak_rss_bytes or 1 << 30) > 1_000_000 and built[0].seconds > 0


def test_steps_are_told(tmp_path: Path) -> None:
    seen: dict[str, Step] = {}

    def look(steps: Mapping[str, Step]) -> None:
        seen.update(steps)
        if seen and seen["x.plan"].what != "Starting":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Builders(2) as running:
        running.order(order(tmp_path, "x", b"slow  "))
        list(running.results(look))
    assert seen["x.plan"].what == "Parsing ONNX"
    assert not (tmp_path / "x.plan").exists()


def fails(folder: Path, model: bytes, sm: int = 90) -> N3CError:
    """Return why a plan is not built, while another is at work, whose process must end too."""
    begun, before, pids = time.monotonic(), set(children(os.getpid())), set[int]()
    with pytest.raises(N3CError) as caught, Builders(2) as running:
        running.order(order(folder, "slow", b"slow  "))
        while not pids:
            time.sleep(0.01)
            pids = set(children(os.getpid())) - before
        running.order(order(folder, "bad", model, sm))
        for _ in running.results(ignored):
            raise AssertionError("nothing can be built")
    assert not any(map(alive, pids))
    assert time.monotonic() - begun < 50, "the other process was waited for"
    assert list(folder.glob("*.plan*")) == []
    return caught.value


def test_a_crash_has_a_place_and_ends_the_others(tmp_path: Path) -> None:
    error = fails(tmp_path, b"crash ")
    (found,) = error.diagnostics
    assert (found.code, found.span, error.exit_code) == ("E0523", SPAN, ExitCode.TARGET)
    assert found.message == "the process that builds bad.plan ended with code 3: no more memory"


@pytest.mark.parametrize("further", [0, 1, 500])
def test_of_long_last_words_the_end_is_told(further: int, tmp_path: Path) -> None:
    path = tmp_path / "printed"
    path.write_bytes(b"x" * further + b"y" * 3999 + b"z")
    with path.open("rb") as printed:
        error = builders._died(order(tmp_path, "bad"), 3, printed)  # pyright: ignore[reportPrivateUsage]
    assert error.diagnostics[0].message == f"the process that builds bad.plan ended with code 3: {'y' * 3999}z"


def test_a_kill_tells_what_helps_where_memory_is_short(tmp_path: Path) -> None:
    (found,) = fails(tmp_path, b"killed").diagnostics
    assert (found.code, found.message) == ("E0523", "the process that builds bad.plan was killed by SIGKILL")
    assert found.help is not None and "--jobs 1" in found.help


def test_what_the_builder_says_arrives(tmp_path: Path) -> None:
    error = fails(tmp_path, b"onnx", sm=91)
    assert ([d.code for d in error.diagnostics], error.exit_code) == (["E0502"], ExitCode.TARGET)


def test_a_process_that_cannot_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no such program"))
    with pytest.raises(FileNotFoundError), Builders(1) as running:
        running.order(order(tmp_path, "x"))
        list(running.results(ignored))


@pytest.mark.parametrize("chosen", [None, "glibc.malloc.mxfast=64"])
def test_the_allocator_of_a_builder_keeps_what_is_freed(
    chosen: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for one who has said how it shall work; and this process keeps its own."""
    if chosen is None:
        monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    else:
        monkeypatch.setenv("GLIBC_TUNABLES", chosen)
    environments: list[Mapping[str, str]] = []

    class Seen(subprocess.Popen[bytes]):
        def __init__(self, command: Any, env: Mapping[str, str], **options: Any) -> None:
            environments.append(env)
            super().__init__(command, env=env, **options)

    monkeypatch.setattr(subprocess, "Popen", Seen)
    with Builders(1) as running:
        running.order(order(tmp_path, "x"))
        list(running.results(ignored))
    (environment,) = environments
    assert (
        environment["GLIBC_TUNABLES"] == chosen or "glibc.malloc.tcache_count=65535:" in environment["GLIBC_TUNABLES"]
    )
    assert environment["PATH"] == os.environ["PATH"] and os.environ.get("GLIBC_TUNABLES") == chosen


ORPHAN = """
import os, sys
from pathlib import Path
from n3c.backends.trt.builder_process import Order, Step
from n3c.backends.trt.builders import Builders

def leave(steps):
    if steps and next(iter(steps.values())) != Step("Starting"):
        print(*(process.pid for process in running._running), flush=True)
        os._exit(0)

running = Builders(1)
running.order(Order(Path("x.onnx"), Path("x.plan"), "full", (90,), {}, {}))
list(running.results(leave))
"""


def test_a_process_ends_when_its_parent_is_gone(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"slow  ")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", ORPHAN], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    pid = int(done.stdout)
    for _ in range(300):
        if not alive(pid):
            return
        time.sleep(0.1)
    raise AssertionError("the process goes on for nobody")


def at_once(folder: Path, estimates: Mapping[str, int], count: int, jobs: int | None = None) -> set[str]:
    """Return which plans are built at once, `count` of them, of those that take so much memory; then end them all."""
    found: set[str] = set()

    def look(steps: Mapping[str, Step]) -> None:
        if len(steps) >= count:
            found.update(name.removesuffix(".plan") for name in steps)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Builders(jobs) as running:
        for name, memory in estimates.items():
            running.order(order(folder, name, b"slow  ", memory=memory))
        list(running.results(look))
    return found


@pytest.mark.parametrize(
    ("free", "held", "built"),
    [
        (9, 0, {"first", "second", "small"}),  # the third would take 4 of what the others will take
        (3, 4, {"first", "small"}),  # what they hold already is not free any more
        (0, 0, {"first"}),
        (100, 0, {"first", "second", "third", "small"}),
        (None, 0, {"first", "second", "third", "small"}),
    ],
)
def test_processes_are_started_while_the_free_memory_holds_them(
    free: int | None, held: int, built: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def held_by(process: int) -> int:
        return held

    monkeypatch.setattr(builders, "usable_cores", lambda: 8)
    monkeypatch.setattr(builders, "available_memory_bytes", lambda: free)
    monkeypatch.setattr(builders, "rss_bytes", held_by)
    assert at_once(tmp_path, {"first": 4, "second": 4, "third": 4, "small": 1}, len(built)) == built


def test_memory_is_not_asked_where_the_number_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builders, "available_memory_bytes", lambda: 0)
    assert at_once(tmp_path, {"a": 5, "b": 5, "c": 5}, 2, jobs=2) == {"a", "b"}


def test_what_does_not_fit_waits_for_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builders, "usable_cores", lambda: 8)
    monkeypatch.setattr(builders, "available_memory_bytes", lambda: 1)
    with Builders() as running:
        for name in ("a", "b", "c"):
            running.order(order(tmp_path, name, memory=4))
        assert {plan.path.name for plan in running.results(ignored)} == {"a.plan", "b.plan", "c.plan"}


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="tells no free memory")
def test_free_memory_and_that_of_a_process() -> None:
    free, total = machine.available_memory_bytes(), machine.memory_bytes()
    assert free is not None and total is not None and 0 < free < total
    held = machine.rss_bytes(os.getpid())
    assert held is not None and 10**7 < held < total
    assert machine.rss_bytes(2**22 + 1) is None  # beyond the largest id
