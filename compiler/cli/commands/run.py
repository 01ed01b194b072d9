"""n3c run: generate with a build."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from n3c.compiler.cli import options
from n3c.compiler.cli.output import print_diagnostics, print_json, tell
from n3c.compiler.cli.progress import TerminalProgress
from n3c.ir.diagnostics import Diagnostic, ExitCode
from n3c.runtime.build_folder import open_build
from n3c.runtime.generation.limits import Room


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


@click.command("run", help="Generate text with BUILD and the weights of a checkpoint.")
@click.argument("build", type=click.Path(path_type=Path))
@click.option("--weights", type=click.Path(path_type=Path), help="Checkpoint directory; must fit the build.")
@click.option("--prompt", "prompts", multiple=True, help="Text to continue; may repeat: a batch.")
@click.option("--prompt-ids", type=Ids(), multiple=True, help="Token ids to continue, as 1,2,3; may repeat.")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="A text file, one prompt a line.")
@click.option("--max-new-tokens", type=click.IntRange(min=0), default=128, show_default=True, help="Most new tokens.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0: greedy.")
@click.option("--top-k", type=click.IntRange(min=0), default=0, help="Draw from the K likeliest tokens; 0: all.")
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=1.0,
    help="Draw from the fewest tokens whose probabilities sum to P.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the random numbers.")
@click.option("--stop", "stops", multiple=True, help="Text that ends a sequence, and is not printed; may repeat.")
@click.option("--stop-ids", type=Ids(), help="Token ids that end a sequence, beside those of the checkpoint.")
@click.option("--ignore-eos", is_flag=True, help="Go on behind the checkpoint's end-of-sequence tokens.")
@click.option("--reasoning-budget", type=click.IntRange(min=0), help="Tokens inside the thinking tags at most.")
@click.option(
    "--thinking-tags",
    nargs=2,
    default=("<think>", "</think>"),
    metavar="START END",
    help="Thinking tags, as text or as token ids.",
)
@click.option("--no-mtp", is_flag=True, help="Decode token by token, without drafts.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where to run.")
@options.common
def command(
    build: Path,
    weights: Path | None,
    prompts: tuple[str, ...],
    prompt_ids: tuple[list[int], ...],
    prompt_file: Path | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    stops: tuple[str, ...],
    stop_ids: list[int] | None,
    ignore_eos: bool,
    reasoning_budget: int | None,
    thinking_tags: tuple[str, str],
    no_mtp: bool,
    device: Literal["cpu", "cuda"],
    as_json: bool,
) -> int:
    """Run BUILD."""
    if not (prompts or prompt_ids or prompt_file):
        raise click.UsageError("nothing to continue: give --prompt, --prompt-ids or --prompt-file")
    from n3c.compiler.cli.generation import Printer, report, summary
    from n3c.runtime.generation.prompts import encoded, read_prompts, tag_ids
    from n3c.runtime.generation.runner import open_runner, require_weights
    from n3c.runtime.generation.sampling import Sampling
    from n3c.runtime.generation.sequence import Options
    from n3c.runtime.generation.tokenizer import find_tokenizer

    with TerminalProgress() as progress:
        progress.phase("open")
        opened = open_build(build)
        directory = require_weights(weights)
        tokenizer = find_tokenizer([directory], opened.spec.model.vocab_size)
        texts = [*prompts, *(read_prompts(prompt_file) if prompt_file is not None else ())]
        ids = [*encoded(texts, tokenizer, directory), *prompt_ids]
        tags = tag_ids(thinking_tags, tokenizer, directory) if reasoning_budget is not None else None
        Room.of(opened.spec).require(ids, max(opened.spec.serving.batch_sizes))
        progress.phase("load")
        runner = open_runner(
            opened, directory, device=device, sequences=len(ids), speculate=not no_mtp, progress=progress
        )
    request = Options(
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p, seed),
        stop_ids=frozenset([*(stop_ids or ()), *(() if ignore_eos else runner.eos_ids)]),
        stop_texts=stops,
        tags=tags,
        reasoning_budget=reasoning_budget,
    )
    printer = Printer(len(ids), tokenizer is not None)
    generation = runner.generation(ids, request, None if as_json else printer.heard)
    interrupted = False
    try:
        generation.run()
    except KeyboardInterrupt:
        interrupted = True
    if as_json:
        print_json(report(generation, device))
    else:
        printer.finish(generation)
        tell(summary(generation))
    if interrupted:
        print_diagnostics([Diagnostic("E0702", "interrupted: what is printed is what there was")])
    return ExitCode.INTERNAL if interrupted else ExitCode.OK
