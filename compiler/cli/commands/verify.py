"""n3c verify: compare all implementations of a build."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from n3c.compiler.cli import options
from n3c.compiler.cli.command import n3c_command
from n3c.compiler.cli.output import print_diagnostics, print_json, say, say_line, suggest
from n3c.compiler.cli.progress import TerminalProgress
from n3c.compiler.cli.table import format_table
from n3c.ir.diagnostics import ExitCode
from n3c.runtime import verify

if TYPE_CHECKING:
    from n3c.runtime.verification.comparison import Verdict

HEADER = ("implementation", "tensors", "largest error", "allowed", "at", "")


@n3c_command(
    "verify",
    "Compare all implementations in BUILD, layer by layer, or the files of CHECKPOINT with its record.",
    examples=(
        ("with random weights", "n3c verify build/my-model"),
        ("with those that will be served", "n3c verify build/my-model --weights my-nvfp4"),
        ("that no file of a checkpoint has changed", "n3c verify my-nvfp4"),
    ),
)
@options.of(verify)
@options.common
def command(build: Path, as_json: bool, **_: Any) -> int:
    """Verify BUILD."""
    with TerminalProgress() as progress:
        verified = verify(**options.given(verify), progress=progress)
    print_diagnostics(verified.diagnostics)
    if as_json:
        print_json(verified.as_json())
    elif not verified.verdicts:
        say_line(f"ok: {build}: every file is as recorded")
    else:
        say(format_table(HEADER, [_row(verdict) for verdict in verified.verdicts]))
        for skipped in verified.not_compared:
            say_line(f"not compared: {skipped.name} ({skipped.reason})")
        say_line(f"{'ok' if verified.ok else 'FAILED'}: {build} with {verified.weights}")
    if verified.ok and verified.verdicts:
        suggest(("run", build, "--weights", options.given(verify).get("weights", "DIR"), "--prompt", "TEXT"))
    return ExitCode.OK if verified.ok else ExitCode.NUMERICS


def _row(verdict: Verdict) -> tuple[str, ...]:
    worst, ending = verdict.worst, "ok" if verdict.ok else "DIFFERS"
    if worst is None:
        return verdict.name, str(verdict.compared), "", "", "", ending
    figures = f"{worst.error:.1e}", f"{worst.tolerance:.0e}", worst.difference.point
    return verdict.name, str(verdict.compared), *figures, ending
