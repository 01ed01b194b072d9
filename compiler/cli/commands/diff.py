"""n3c diff: what changed between two specs, checkpoints or builds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from n3c.compiler import diff
from n3c.compiler.cli import options
from n3c.compiler.cli.command import n3c_command
from n3c.compiler.cli.output import print_diagnostics, print_json, say, say_line
from n3c.compiler.cli.progress import TerminalProgress
from n3c.compiler.cli.table import format_table
from n3c.ir.diagnostics import ExitCode

if TYPE_CHECKING:
    from n3c.compiler.report.difference import Difference
    from n3c.compiler.report.ir_difference import FunctionDifference
    from n3c.compiler.report.spec_difference import Change
    from n3c.compiler.report.tensor_difference import TensorDifference, Values, WeightDifference

WIDTH = 80
"""Columns within which both values of a key stand on its line."""
SHOWN = 40
"""Rows of a list that the terminal gets; --json and --html have all."""


@n3c_command(
    "diff",
    "Say what changed between two specs, checkpoints or builds.",
    examples=(
        ("two shipped models", "n3c diff nano lightning"),
        ("the error of quantization", "n3c diff run/export my-model-nvfp4"),
        ("two builds, as a page", "n3c diff build/my-model build/other --html diff.html"),
    ),
    groups={
        "What is compared": ("--context", "--batch", "--headers-only"),
        "What is printed": ("--ir", "--html", "--force", "--exit-code"),
    },
)
@options.of(diff)
@click.option("--ir", "shows_ir", is_flag=True, help="Print the lines of the IR that differ, not only how many.")
@click.option("--exit-code", is_flag=True, help="Exit with 5 where A and B differ.")
@options.common
def command(shows_ir: bool, exit_code: bool, as_json: bool, **_: Any) -> int:
    """Compare A and B."""
    with TerminalProgress() as progress:
        found = diff(**options.given(diff), progress=progress)
    print_diagnostics(found.warnings)
    if as_json:
        print_json(found.as_json())
    else:
        _print(found, shows_ir)
    return ExitCode.NUMERICS if exit_code and not found.equal else ExitCode.OK


def _print(found: Difference, shows_ir: bool) -> None:
    for side, subject in (("a", found.a), ("b", found.b)):
        say_line(f"{side}  {subject.given}: {subject.spec.name} ({subject.kind})")
    if found.equal:
        say("\nno differences")
        return
    _print_changes("spec", found.spec)
    rows = [
        (c.figure, f"{c.a:,}", f"{c.b:,}", f"x {c.ratio:.3f}" if c.ratio is not None else "") for c in found.figures
    ]
    _print_table(("figure", "a", "b", ""), rows)
    if found.blocks:
        say("\nblocks")
        for change in found.blocks[:SHOWN]:
            say_line(f"  {_places(change.labels_a, change.labels_b)}")
            for what in change.what:
                say_line(f"      {what}")
        _print_rest(len(found.blocks))
    if found.ir:
        say("\nprogram of serving, by function (parameters and entry points follow from it)")
        for function in found.ir:
            _print_function(function, shows_ir)
    _print_changes("build", found.build)
    if found.tensors:
        _print_tensors(found.tensors)


def _print_changes(title: str, changes: Sequence[Change]) -> None:
    if not changes:
        return
    say(f"\n{title}")
    for change in changes[:SHOWN]:
        line = f"  {change.key}  {change.a} → {change.b}"
        if change.a is not None and change.b is not None and len(line) <= WIDTH:
            say_line(line)
            continue
        say_line(f"  {change.key}")
        for sign, value in (("-", change.a), ("+", change.b)):
            if value is not None:
                say_line(f"    {sign} {value}")
    _print_rest(len(changes))


def _print_function(function: FunctionDifference, shows_ir: bool) -> None:
    counts = f"  +{function.added} -{function.removed} lines" if function.lines else ""
    say_line(f"  {function.state:<8} {function.name}{counts}")
    if shows_ir and function.state == "changed":
        for line in function.lines:
            say_line(f"      {line}")


def _print_tensors(tensors: TensorDifference) -> None:
    say(f"\nweights: {tensors.equal:,} equal, {len(tensors.changed):,} differ")
    for side, names in (("a", tensors.only_a), ("b", tensors.only_b)):
        if names:
            say_line(f"  only in {side}: {', '.join(names[:3])}{f' and {len(names) - 3:,} more' if names[3:] else ''}")
    groups: dict[tuple[str, str, str], list[WeightDifference]] = {}
    for weight in tensors.changed:
        formats = weight.format_a if weight.format_a == weight.format_b else f"{weight.format_a} → {weight.format_b}"
        shape = "" if weight.shape_a == weight.shape_b else f"{list(weight.shape_a)} → {list(weight.shape_b)}"
        groups.setdefault((re.sub(r"\.\d+\.", ".*.", weight.name), formats, shape), []).append(weight)
    rows: list[tuple[str, ...]] = []
    for (name, formats, shape), weights in list(groups.items())[:SHOWN]:
        values = [weight.values for weight in weights if weight.values is not None]
        mean, worst, largest = ("", "", "") if not values else _errors(values)
        rows.append((name, str(len(weights)), formats, shape, mean, worst, largest))
    _print_table(("weights that differ", "", "format", "shape", "relative error", "worst", "largest"), rows)
    _print_rest(len(groups))


def _errors(values: Sequence[Values]) -> tuple[str, str, str]:
    """Return the mean and the worst relative error, and the largest difference of a value."""
    errors = [value.relative_error for value in values]
    return f"{sum(errors) / len(errors):.2e}", f"{max(errors):.2e}", f"{max(value.largest for value in values):.2e}"


def _print_table(header: Sequence[str], rows: Sequence[tuple[str, ...]]) -> None:
    if rows:
        say("")
        say(format_table(header, rows))


def _print_rest(count: int) -> None:
    if count > SHOWN:
        say(f"  … and {count - SHOWN:,} more (--json has all)")


def _places(a: Iterable[str], b: Iterable[str]) -> str:
    """Return where blocks differ, `40 blocks, backbone.layers.1 … backbone.layers.87`, on both sides if they moved."""
    a, b = tuple(a), tuple(b)
    if not a or not b:
        return f"{'+' if b else '-'} {_run(a or b)}"
    return _run(a) if a == b else f"{_run(a)} → {_run(b)}"


def _run(labels: Sequence[str]) -> str:
    if len(labels) <= 3:
        return ", ".join(labels)
    return f"{len(labels)} blocks, {labels[0]} … {labels[-1]}"
