"""n3c run: generate with a build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from n3c.compiler.cli import options
from n3c.compiler.cli.command import n3c_command
from n3c.compiler.cli.output import print_diagnostics, print_json, remark
from n3c.compiler.cli.progress import TerminalProgress
from n3c.ir.diagnostics import Diagnostic, ExitCode
from n3c.runtime import load
from n3c.runtime.generation.model import Model


class Ids(click.ParamType[list[int]]):
    """`1,2,3`."""

    name = "IDS"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """Return the numbers."""
        from n3c.runtime.generation.prompts import parse_ids

        ids = parse_ids(str(value))
        if ids is None:
            self.fail(f"{value!r} is not a list of token ids, as 1,2,3", param, ctx)
        return ids


@n3c_command(
    "run",
    "Generate text with BUILD and the weights of a checkpoint.",
    examples=(
        ("on the CPU", "n3c run build/my-model --weights my-nvfp4 --prompt 'Once upon'"),
        ("by TensorRT on a GPU", "n3c run build/my-model --weights my-nvfp4 --prompt 'Once upon' --device cuda"),
        (
            "drawn, not the likeliest",
            "n3c run build/my-model --weights my-nvfp4 --prompt-file FILE --temperature 0.7",
        ),
    ),
    groups={
        "Prompts": ("--prompt", "--prompt-ids", "--prompt-file"),
        "Where it runs": ("--device", "--engine", "--no-mtp"),
        "Sampling": ("--temperature", "--top-k", "--top-p", "--seed"),
        "Where it ends": (
            "--max-new-tokens",
            "--stop",
            "--stop-ids",
            "--ignore-eos",
            "--reasoning-budget",
            "--thinking-tags",
        ),
    },
)
@options.of(load)
@click.option("--prompt", "prompts", multiple=True, help="Text to continue; may repeat: a batch.")
@click.option("--prompt-ids", type=Ids(), multiple=True, help="Token ids to continue, as 1,2,3; may repeat.")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="A text file, one prompt a line.")
@options.of(Model.generate)
@options.common
def command(
    prompts: tuple[str, ...], prompt_ids: tuple[list[int], ...], prompt_file: Path | None, as_json: bool, **_: Any
) -> int:
    """Run BUILD."""
    if not (prompts or prompt_ids or prompt_file):
        raise click.UsageError("nothing to continue: give --prompt, --prompt-ids or --prompt-file")
    from n3c.compiler.cli.generation import Printer, summary
    from n3c.runtime.generation.prompts import read_prompts

    with TerminalProgress() as progress:
        model = load(**{"weights": None} | options.given(load), progress=progress)
        texts = [*prompts, *(read_prompts(prompt_file) if prompt_file is not None else ())]
        stream = model.generate([*texts, *prompt_ids], **options.given(Model.generate), stream=True)
    printer = Printer(len(texts) + len(prompt_ids), model.tokenizer is not None)
    try:
        for piece in stream:
            if not as_json:
                printer.show(piece)
    except KeyboardInterrupt:
        stream.interrupt()
    generated = stream.result()
    if as_json:
        print_json(generated.as_json())
    else:
        printer.finish(generated)
        remark(summary(generated))
    if generated.interrupted:
        print_diagnostics([Diagnostic("E0702", "interrupted: what is printed is what there was")])
    return ExitCode.INTERNAL if generated.interrupted else ExitCode.OK
