"""Tables and colors: what fits a terminal, what a pipe gets, and what the surroundings ask for."""

from __future__ import annotations

import pytest

from n3c.compiler.cli.table import format_table
from support.command import PROGRAM, n3c, n3c_program
from support.terminal import on_terminal

RED = "\x1b[31m"


def test_text_is_left_figures_are_right_and_a_row_is_a_line() -> None:
    rows = [("[red]a[/red] :smile:", "9.45 GB", "word " * 40 + "\x1b[2J\n"), ("日本", "145.41 kB", "")]
    assert format_table(("name", "weights", "what"), rows).splitlines() == [
        "name                    weights  what",
        "--------------------- ---------- " + "-" * 209,
        "[red]a[/red] :smile:    9.45 GB  " + "word " * 40 + "\\x1b[2J\\n",
        "日本                  145.41 kB",
    ]


@pytest.mark.parametrize(
    ("cell", "figure"),
    [
        ("1,048,576", True), ("0.01 %", True), ("x 0.940", True), ("1.9e-07", True), ("-3", True),
        ("1.23.2", False), ("RTX 5090", False), ("5090 Ti super", False), ("2.13.0+cpu", False),
    ],
)  # fmt: skip
def test_what_a_figure_is(cell: str, figure: bool) -> None:
    table = format_table(("a title that is longer", "b"), [(cell, "x")])
    assert table.splitlines()[2].startswith(" ") == figure


@pytest.mark.parametrize(
    "command",
    [
        "inspect super",
        "check super --target trt --sm 86",
        "check super --context 8192",
        "doctor",
        "--help",
    ],
)
def test_a_terminal_of_80_columns_gets_lines_that_fit(command: str) -> None:
    code, seen = on_terminal([*PROGRAM, *command.split()], TERM="dumb")
    assert code == 0
    assert [line for line in seen.replace("\r", "").splitlines() if len(line) > 80] == []


def test_a_pipe_gets_what_no_terminal_has_cut() -> None:
    out = n3c("check", "super", "--target", "trt", "--sm", "86").out
    row = "prefill  experts  nvfp4   BF16 matrix product, FP4 and FP8 weights decoded by tables once a call"
    assert row in out.splitlines()


def test_colors_are_for_terminals_unless_the_surroundings_say_otherwise() -> None:
    command = [*PROGRAM, "check", "missing"]
    assert RED in on_terminal(command, TERM="xterm")[1]
    assert RED in on_terminal(command, TERM="xterm", CI="true")[1]
    assert "\x1b[" not in on_terminal(command, TERM="xterm", NO_COLOR="1")[1]
    assert "\x1b[" not in on_terminal(command, TERM="xterm", NO_COLOR="1", FORCE_COLOR="1")[1]
    assert "\x1b[" not in on_terminal(command, TERM="dumb")[1]
    assert RED in n3c_program("check", "missing", FORCE_COLOR="1").err
    assert "\x1b[" not in n3c_program("check", "missing", NO_COLOR="", FORCE_COLOR="").err


def test_an_error_on_a_terminal_is_text() -> None:
    _, seen = on_terminal([*PROGRAM, "check", "[red]\x1b]0;title\x07"], TERM="xterm")
    assert "\x1b]" not in seen
    assert "[red]\\x1b]0;title" in seen
