"""Plans from builders, from the cache and from each other: the same build, whichever way. With a stand-in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from n3c.backends.trt.builder_process import Order
from n3c.backends.trt.builders import Builders
from n3c.compiler import build, repro
from n3c.compiler.building.driver import Built
from n3c.compiler.building.plan_source import PlanSource
from n3c.ir.diagnostics import N3CError
from support.command import PROGRAM, default_signals, n3c, tree, write_small
from support.fake_tensorrt_module import install_stand_in
from support.processes import alive, children
from support.progress import Recorded

SERVING = ("max_seq_len = 32", "batch_sizes = [1, 2]\nmax_seq_len = 32\nprefill_chunk = 8\ndraft_tokens = 2")
ARGUMENTS: dict[str, Any] = {"target": "trt", "trt": "full", "sm": 90, "entry": ["draft", "decode"]}


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "modules").mkdir()
    install_stand_in(tmp_path / "modules", monkeypatch)
    monkeypatch.setenv("N3C_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    return write_small(tmp_path, SERVING)


def test_the_same_build_with_and_without_cache_with_one_and_more_processes(spec: Path, tmp_path: Path) -> None:
    trees: list[dict[str, bytes]] = []
    counts: list[dict[str, int]] = []
    ways: list[dict[str, Any]] = [{"jobs": 1, "no_cache": True}, {"jobs": 3}, {"jobs": 3}, {"no_cache": True}]
    for i, way in enumerate(ways):
        built = build(spec, output=tmp_path / f"out{i}", **ARGUMENTS, **way)
        trees.append(tree(tmp_path / f"out{i}"))
        counts.append(dict(built.plans))
        assert not list((tmp_path / "cache").rglob("*")) or i > 0
    assert [c["built"] for c in counts] == [4, 4, 0, 4]
    assert [c["cached"] for c in counts] == [0, 0, 4, 0]
    assert trees[0] == trees[1] == trees[2] == trees[3]
    assert "trt/decode.b2.plan" in trees[0]


def test_what_is_asked_otherwise_is_built(spec: Path, tmp_path: Path) -> None:
    def counts(**changes: Any) -> tuple[int, int]:
        arguments: dict[str, Any] = {**ARGUMENTS, "entry": ["draft"], **changes}
        built = build(spec, output=tmp_path / "out", **arguments)
        return built.plans["built"], built.plans["cached"]

    assert counts() == (2, 0)
    assert counts(set=["name=another"]) == (0, 2)  # the name of a model is not in its plans
    assert counts(sm=100) == (2, 0)
    assert counts(set=["model.norm_eps=1e-6"]) == (2, 0)


def test_repro_builds(spec: Path, tmp_path: Path) -> None:
    build(spec, output=tmp_path / "out", **ARGUMENTS)
    for entry in (tmp_path / "cache" / "plans").iterdir():
        entry.write_bytes(b"")
    assert repro(tmp_path / "out").ok
    assert {entry.stat().st_size for entry in (tmp_path / "cache" / "plans").iterdir()} == {0}  # nobody looked


def test_a_damaged_entry_is_built_again(spec: Path, tmp_path: Path) -> None:
    build(spec, output=tmp_path / "out", **ARGUMENTS)
    first = tree(tmp_path / "out")
    damaged = next((tmp_path / "cache" / "plans").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    built = build(spec, output=tmp_path / "out", **ARGUMENTS)
    assert (built.plans["built"], built.plans["cached"]) == (1, 3)
    assert tree(tmp_path / "out") == first


def test_the_cache_is_as_large_as_it_is_told(spec: Path, tmp_path: Path) -> None:
    build(spec, output=tmp_path / "out", cache_size=2500, **ARGUMENTS)
    sizes = [entry.stat().st_size for entry in (tmp_path / "cache" / "plans").iterdir()]
    assert sizes and sum(sizes) <= 2500
    refused = n3c("build", spec, "--target", "trt", "--cache-size", "much", "--json")
    assert (refused.code, refused.codes) == (2, ["E0701"])


def test_without_a_cache_it_is_said_once(spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("N3C_CACHE_DIR", str(tmp_path / "file"))

    def notes(built: Built) -> list[str]:
        return [found.code for found in built.warnings if found.code == "W0524"]

    assert notes(build(spec, output=tmp_path / "out", **ARGUMENTS)) == ["W0524"]
    assert notes(build(spec, output=tmp_path / "out", no_cache=True, **ARGUMENTS)) == []


def test_a_full_disk_of_the_cache_is_no_fault(spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "/cache")

    monkeypatch.setattr("n3c.backends.trt.plan_cache.PlanCache.keep", full)
    built = build(spec, output=tmp_path / "out", **ARGUMENTS)
    assert [found.code for found in built.warnings if found.code == "W0524"] == ["W0524"]
    assert built.plans["built"] == 4


def test_plans_of_the_same_graph_are_built_once(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"onnx")
    shown = Recorded()
    with Builders(2) as builders:
        source = PlanSource(builders, 0)
        for name, key in (("a", "1"), ("b", "1"), ("c", "2"), ("d", None)):
            plan = tmp_path / f"{name}.plan"
            source.want(Order(tmp_path / "x.onnx", plan, "full", (90,), {}, {}), key)
        made = {plan.path.name: plan.path.read_bytes() for plan in source.plans(shown)}
    assert made == dict.fromkeys(("a.plan", "b.plan", "c.plan", "d.plan"), b"engine!")
    assert source.counts.as_json() == {"built": 3, "cached": 0, "same": 1}
    assert [(done, total) for _, done, total in shown.items] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert "b.plan as a.plan" in {what for what, _, _ in shown.items}


def test_a_builder_that_fails_leaves_nothing(spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("N3C_TEST_FAILS", "no memory")
    with pytest.raises(N3CError) as caught:
        build(spec, output=tmp_path / "out", **ARGUMENTS)
    assert {(found.code, caught.value.exit_code.value) for found in caught.value.diagnostics} == {("E0505", 4)}
    assert not any(".out" in path.name or path.name == "out" for path in tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_all_processes_and_leaves_nothing(number: signal.Signals, spec: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "N3C_TEST_SLOW": "1"}
    arguments = ["--target", "trt", "--trt", "full", "--sm", "90", "--jobs", "2", "-v", "-o", "out"]
    with subprocess.Popen(
        [*PROGRAM, "build", str(spec), *arguments],
        cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=default_signals,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        while "(Parsing ONNX)" not in process.stderr.readline():
            assert process.poll() is None
        pids = children(process.pid)
        assert pids
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err.strip().splitlines()[-1]) == (1, "error[E0702]: interrupted")
    for _ in range(100):
        if not any(map(alive, pids)):
            break
        time.sleep(0.1)
    assert not any(map(alive, pids))
    assert {path.name for path in tmp_path.iterdir()} <= {"small.toml", "modules", "cache"}


def test_each_plan_has_a_line_with_what_is_left(spec: Path, tmp_path: Path) -> None:
    result = n3c("build", spec, "--target", "trt", "--trt", "full", "--sm", "90", "--entry", "draft", "-o",
                 tmp_path / "out", "--json")  # fmt: skip
    lines = [line for line in result.err.splitlines() if "build plans: draft" in line]
    assert len(lines) == 2 and "1 of 2" in lines[0] and "2 of 2" in lines[1]
    assert json.loads(result.out)["plans"] == {"built": 2, "cached": 0, "same": 0}
