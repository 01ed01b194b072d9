"""n3c repro: build again, and compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from n3c.compiler import repro
from n3c.compiler.cli import options
from n3c.compiler.cli.command import n3c_command
from n3c.compiler.cli.output import print_diagnostics, print_json, say, say_line
from n3c.compiler.cli.progress import TerminalProgress
from n3c.compiler.cli.table import format_table
from n3c.ir.diagnostics import ExitCode


@n3c_command(
    "repro",
    "Build again what BUILD was made of, and compare every file.",
    examples=(("compare every file", "n3c repro build/my-model"),),
)
@options.of(repro)
@options.common
def command(build: Path, as_json: bool, **_: Any) -> int:
    """Reproduce BUILD."""
    with TerminalProgress() as progress:
        reproduced = repro(**options.given(repro), progress=progress)
    print_diagnostics(reproduced.diagnostics)
    if as_json:
        print_json(reproduced.as_json())
    else:
        others = [(file.path, file.verdict, file.detail) for file in reproduced.files if file.verdict != "equal"]
        if others:
            say(format_table(("file", "again", ""), others))
        equal = len(reproduced.files) - len(others)
        say_line(f"{'ok' if reproduced.ok else 'FAILED'}: {build}, {equal} of {len(reproduced.files)} files are equal")
    return ExitCode.OK if reproduced.ok else ExitCode.NUMERICS
