"""n3c verify: do all forms of a model compute the same?"""

from __future__ import annotations

from pathlib import Path

import click

from n3c.compiler.cli import options
from n3c.compiler.cli.output import print_diagnostics, print_json, say
from n3c.compiler.cli.progress import TerminalProgress
from n3c.compiler.cli.table import format_table
from n3c.ir.diagnostics import ExitCode
from n3c.runtime.build_folder import open_build


@click.command("verify", help="Compare PyTorch, ONNX and TensorRT forms of BUILD with the reference, layer by layer.")
@click.argument("build", type=click.Path(path_type=Path))
@click.option("--weights", type=click.Path(path_type=Path), help="Checkpoint directory (default: random weights).")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of tokens and random weights.")
@options.common
def command(build: Path, weights: Path | None, seed: int, as_json: bool) -> int:
    """Verify BUILD."""
    with TerminalProgress() as progress:
        progress.phase("open")
        opened = open_build(build)
        from n3c.runtime.verification.compare import Verdict, compare, diagnostics
        from n3c.runtime.verification.implementations import forms, reference, require_small
        from n3c.runtime.verification.scenario import scenarios
        from n3c.runtime.verification.weights import checkpoint_for

        require_small(opened)
        checkpoint = checkpoint_for(opened, weights, seed)
        program, batch = opened.served.program, min(opened.spec.serving.batch_sizes)
        progress.phase("load")
        base = reference(opened, checkpoint, batch)
        with forms(opened, checkpoint, batch) as (compared, skipped):
            progress.phase("compare")
            runs = scenarios(opened.spec, program, batch, seed)
            verdicts = compare(base, compared, program, runs, progress)
    found = diagnostics(verdicts, program, str(build))

    def row(verdict: Verdict) -> tuple[str, ...]:
        worst = verdict.worst
        figures = (
            (f"{worst.difference.relative:.1e}", f"{worst.tolerance:.0e}", worst.difference.point)
            if worst
            else ("",) * 3
        )
        return verdict.name, str(verdict.compared), *figures, "ok" if verdict.ok else "DIFFERS"

    print_diagnostics(found)
    if as_json:
        print_json(
            {
                "ok": not found,
                "weights": str(checkpoint.directory),
                "forms": [verdict.as_json() for verdict in verdicts],
                "not_compared": [{"name": s.name, "reason": s.reason} for s in skipped],
                "diagnostics": [d.as_json() for d in found],
            }
        )
    else:
        header = ("form", "tensors", "largest error", "allowed", "at", "")
        say(format_table(header, [row(verdict) for verdict in verdicts]))
        for form in skipped:
            say(f"not compared: {form.name} ({form.reason})")
        say(f"{'FAILED' if found else 'ok'}: {build} with {checkpoint.directory}")
    return ExitCode.NUMERICS if found else ExitCode.OK
