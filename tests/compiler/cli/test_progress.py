"""Progress: phase, item and elapsed time; a live line on a terminal that is put right again, plain lines elsewhere."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from n3c.compiler import build
from n3c.compiler.cli.progress import TerminalProgress
from support.command import PROGRAM, write_small
from support.progress import Recorded
from support.terminal import on_terminal

LINE = re.compile(r"^ *\d+\.\d s  \S")
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"
"""What hides the cursor of a terminal, and shows it again."""

ONE_LAYER = ('pattern = "MEM*E-ME"', 'pattern = "ME"')


def test_plain_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with TerminalProgress() as shown:
        shown.phase("emit [x]")
        for i in range(120):
            now += 0.1
            shown.step(f"layer.{i}", i + 1, 120)
        shown.step("Timing")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "   0.0 s  emit [x]",
        "   5.1 s  emit [x]: layer.50 51/120",
        "  10.2 s  emit [x]: layer.101 102/120",
    ]


def test_emission_and_builder_report_what_they_are_at(tmp_path: Path) -> None:
    spec = write_small(tmp_path, ONE_LAYER, ("[serving]", "[serving]\nbatch_sizes = [1, 2]"))
    shown = Recorded()
    built = build(spec, target="trt", output=tmp_path / "out", entry=("decode",), progress=shown)
    emitting = ["emit decode.b2", "emit decode.b1"]  # what takes longest to build first
    assert shown.phases == ["load", "passes", *emitting, "build plans", "manifest"]
    assert {what.partition(" in ")[0] for what, _, _ in shown.items} == {"decode.b1.plan", "decode.b2.plan"}
    assert [(done, total) for _, done, total in shown.items] == [(1, 2), (2, 2)]
    bindings = json.loads((tmp_path / "out/trt/bindings.json").read_text(encoding="utf-8"))
    assert list(bindings["entries"]) == ["decode.b1", "decode.b2"]
    emitted = shown.by_phase["emit decode.b1"]
    assert [done for _, done, _ in emitted] == list(range(1, len(emitted) + 1))
    assert {total for _, _, total in emitted} == {len(emitted)}
    assert "backbone.layers.1" in {what for what, _, _ in emitted}
    builder = shown.by_phase["build plans"]
    assert builder  # what it is at is looked at now and then: `test_builders` and `test_build` see every phase
    assert all(0 <= done <= total or total == 0 for _, done, total in builder)
    assert {file["path"] for file in built.files} >= {"trt/decode.b1.plan", "trt/audit.json", "onnx/decode.onnx"}


SLOW = """
import sys, time
from n3c.compiler.cli.main import main
from n3c.compiler.building import driver

def slow(job, *flops):
    job.progress.phase("emit [x]")
    job.progress.step("layer", 3, 7)
    for _ in range(1200):  # a signal just before one long sleep would be seen after it alone
        time.sleep(0.05)

driver._emit_torch = slow
main(sys.argv[1:])
"""


def test_a_live_line_and_the_cursor_comes_back(tmp_path: Path) -> None:
    arguments = ["build", str(write_small(tmp_path)), "--target", "torch", "-o", str(tmp_path / "out")]
    code, seen = on_terminal([*PROGRAM, *arguments, "--print-ir-after", "cleanup"], TERM="xterm")
    assert code == 0
    assert HIDE in seen
    assert seen.rindex(SHOW) > seen.rindex(HIDE)
    assert "// after cleanup" in seen
    assert "Traceback" not in seen


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_restores_the_terminal(number: signal.Signals, tmp_path: Path) -> None:
    sent: list[float] = []

    def interrupt(seen: str, process: subprocess.Popen[bytes]) -> None:
        if not sent and "emit [x]: layer" in seen and "3/7" in seen:
            sent.append(time.monotonic())
            process.send_signal(number)

    arguments = ["build", str(write_small(tmp_path)), "--target", "torch", "-o", str(tmp_path / "out")]
    code, seen = on_terminal([sys.executable, "-c", SLOW, *arguments], interrupt, TERM="xterm")
    assert sent
    assert code == 1
    assert seen.rindex(SHOW) > seen.rindex(HIDE)
    assert "interrupted" in seen[seen.rindex(SHOW) :]
    assert "Traceback" not in seen
    assert [path.name for path in tmp_path.iterdir()] == ["small.toml"]


def test_an_error_restores_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    arguments = ["build", str(write_small(tmp_path)), "--target", "torch", "-o", str(tmp_path / "out")]
    code, seen = on_terminal([*PROGRAM, *arguments], TERM="xterm")
    assert code == 6
    assert "E0610" in seen[seen.rindex(SHOW) :]


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TERM": "xterm", "CI": "true"}])
def test_a_dumb_terminal_and_a_ci_get_plain_lines(environment: dict[str, str], tmp_path: Path) -> None:
    arguments = ["build", str(write_small(tmp_path)), "--target", "torch", "-o", str(tmp_path / "out")]
    code, seen = on_terminal([*PROGRAM, *arguments], None, **environment)
    assert code == 0
    assert HIDE not in seen
    assert LINE.search(seen)


COUNTED = """
import time
from n3c.compiler.cli.progress import TerminalProgress
with TerminalProgress() as progress:
    progress.phase("pack")
    for i in range(30):
        progress.step("[red]layer[/red]:smile:\\x1b[2J" + "x" * 90, i + 1, 60)
        time.sleep(0.02)
    progress.step("something else")
    time.sleep(0.3)
"""


def test_a_known_total_gets_a_bar_a_rate_and_the_time_left_and_names_are_text() -> None:
    _, seen = on_terminal([sys.executable, "-c", COUNTED], TERM="xterm")
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]+", seen)]
    counted = [line for line in lines if re.search(r"━.* \d+/60 +\d+\.\d/s \d\d:\d\d", line)]
    assert counted
    assert all("pack: [red]layer[/red]:smile:\\x1b" in line for line in counted)
    assert any("something else" in line and "/60" not in line for line in lines)
    assert max(map(len, lines)) <= 80
