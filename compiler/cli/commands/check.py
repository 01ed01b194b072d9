"""n3c check: everything that would fail later, without weights, GPU, torch import or build."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from n3c.compiler import check
from n3c.compiler.cli import options
from n3c.compiler.cli.annotations import github, sarif
from n3c.compiler.cli.command import n3c_command
from n3c.compiler.cli.fits import format_fits
from n3c.compiler.cli.output import print_diagnostics, print_json, say, say_line, suggest
from n3c.compiler.cli.table import format_table
from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError

if TYPE_CHECKING:  # only asked for what a target's forms are
    from n3c.backends.onnx.forms import Form
    from n3c.compiler.building.checks import Checked


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was found in one SPEC."""

    spec: Path
    checked: Checked | None
    """None where it has errors."""
    diagnostics: tuple[Diagnostic, ...]
    code: ExitCode

    def as_json(self) -> dict[str, Any]:
        """Return the form of `check --json`."""
        found = {"diagnostics": [diagnostic.as_json() for diagnostic in self.diagnostics]}
        return (self.checked.as_json() if self.checked else {}) | {"ok": self.code is ExitCode.OK} | found


@n3c_command(
    "check",
    "Find everything that would fail later, without weights, GPU or build.",
    examples=(
        ("every mistake at once", "n3c check my-model.toml"),
        ("a model with another top-k, from standard input", "n3c check - --set moe.top_k=8"),
        ("how an RTX 4090 would compute with it", "n3c check super --target trt --sm 89"),
        ("what holds 8 sequences of 131072 tokens", "n3c check super --batch 8 --context 131072"),
        ("in CI", "n3c check my-model.toml my-other.toml --format github --warnings-as-errors"),
    ),
    groups={
        "Target": ("--target", "--trt", "--sm"),
        "Memory": ("--context", "--batch", "--memory"),
        "What is printed": ("--format", "--warnings-as-errors"),
    },
)
@options.of(check, several=True)
@click.option(
    "--format",
    "format_",
    type=click.Choice(["text", "github", "sarif"]),
    default="text",
    show_default=True,
    help="Form of what is found: for people, as annotations of GitHub Actions, or as SARIF 2.1.0.",
)
@click.option("--warnings-as-errors", is_flag=True, help="Fail (exit code 3) where there are warnings.")
@options.common
def command(spec: tuple[Path, ...], format_: str, warnings_as_errors: bool, as_json: bool, **_: Any) -> int:
    """Check each SPEC."""
    if as_json and format_ != "text":
        raise click.UsageError("--json and --format: give one of them")
    given = options.given(check)
    outcomes = [_outcome(path, given | {"spec": path}, warnings_as_errors) for path in spec]
    diagnostics = [diagnostic for outcome in outcomes for diagnostic in outcome.diagnostics]
    if format_ == "github":
        say("".join(f"{line}\n" for line in github(diagnostics)), newline=False)
    elif format_ == "sarif":
        print_json(sarif(diagnostics))
    else:
        print_diagnostics(diagnostics)
        _print_json(outcomes) if as_json else _print(
            outcomes, shows_fits=bool({"context", "batch", "memory"} & set(given))
        )
    code = max(outcome.code for outcome in outcomes)
    if code is ExitCode.OK and len(spec) == 1 and format_ == "text" and str(spec[0]) != "-":
        overrides = options.overrides(given)
        target = ("--target", given.get("target", "torch"))
        suggest(("inspect", *spec, *overrides), ("build", *spec, *target, *overrides))
    return code


def _outcome(spec: Path, given: dict[str, Any], warnings_as_errors: bool) -> Outcome:
    try:
        checked = check(**given)
    except N3CError as error:
        if error.exit_code is ExitCode.USAGE:  # said once, not of each SPEC
            raise
        options.show_traceback()
        return Outcome(spec, None, error.diagnostics, error.exit_code)
    failed = warnings_as_errors and checked.warnings
    return Outcome(spec, checked, checked.warnings, ExitCode.SPEC if failed else ExitCode.OK)


def _print_json(outcomes: Sequence[Outcome]) -> None:
    if len(outcomes) == 1:
        print_json(outcomes[0].as_json())
        return
    entries = [{"file": str(outcome.spec), **outcome.as_json()} for outcome in outcomes]
    print_json({"ok": all(entry["ok"] for entry in entries), "specs": entries})


def _print(outcomes: Sequence[Outcome], *, shows_fits: bool) -> None:
    for outcome in outcomes:
        checked = outcome.checked
        if checked is None:
            continue
        count = len(checked.warnings)
        counted = f"; {count} warning{'s' if count > 1 else ''}" if count else ""
        verdict = "ok" if outcome.code is ExitCode.OK else "FAILED"
        say_line(f"{outcome.spec}: {verdict} ({checked.spec.name}), {checked.spec.model.pattern.summary()}{counted}")
        if checked.target == "trt":
            say(_forms(checked.forms()))
        if shows_fits:
            say(format_fits([fit.as_json() for fit in checked.fits]))


def _forms(forms: tuple[Form, ...]) -> str:
    rows = [(form.entry, form.weights, form.format, form.how) for form in forms]
    return format_table(("entry", "weights", "format", "form"), rows)
