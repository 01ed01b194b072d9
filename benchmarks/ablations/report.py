"""The report: a table and a plot for each question, as docs/ablations.md."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean, stdev
from textwrap import fill

from n3c.compiler.report.cost import count_parameters
from n3c.passes.lower.model import lower

from ..plot import Series, line_plot
from .arms import Arm, Question
from .runs import Length, Run, mean_curve

NOTES = {
    "latent-moe": (
        "α times the experts and α times as many a token, in a latent width of 1/α (arXiv 2601.18089): the routed "
        "experts have the same parameters, the same active ones, and a token sends and reads the same bytes. The "
        "shared expert gives up what the latent projections and the wider router cost, so that the active parameters "
        "of the whole model are equal to within the table's difference."
    ),
    "mtp": (
        "The loss is that of the next token alone, from the main head. One shared block, applied `depth` times; its "
        "loss counts 0.3 times its mean over depths. Without it a step is cheaper: the arms see the same tokens, "
        "not the same compute."
    ),
    "nvfp4": (
        "The recipe is [training] of specs/tiny.toml: 16 x 16 weight blocks, random Hadamard transform and stochastic "
        "rounding in the weight gradient, attention, latent projections, router, head and the last two blocks in BF16, "
        "Mamba's out_proj in MXFP8. The other arms leave out one ingredient each. All emulated by `numerics.py`."
    ),
}


def report(questions: list[Question], runs: list[Run], length: Length, machine: list[str]) -> dict[str, str]:
    """Return the files of the report: path below docs/ → content."""
    files: dict[str, str] = {}
    text = [*opening(length, len({run.seed for run in runs})), *machine]
    for question in questions:
        of_arm = {arm.name: sorted_runs(arm, runs) for arm in question.arms}
        image = f"images/ablation-{question.name}.svg"
        files[image] = plot(question, of_arm, length)
        text += ["", f"## {question.title}", "", fill(NOTES[question.name], 120), "", *table(question, of_arm), ""]
        text += [f"![training loss above {question.arms[0].label}]({image})"]
    files["ablations.md"] = "\n".join(text) + "\n"
    return files


def opening(length: Length, seeds: int) -> Iterator[str]:
    """Yield what holds for all runs."""
    yield "# Ablations"
    yield ""
    yield fill(
        "Written by `make ablations`, which trains every arm with the generated `train.py` and writes this page. "
        f"Each run: {length.steps} steps of {length.batch_size} x {length.seq_len} bytes ({length.tokens:,} in all) of "
        "the source text of Python's standard library, learning rate "
        f"{length.lr:g}, {seeds} seeds, which choose both the fresh weights and the order of the data. Losses are in "
        f"bits a byte on {length.validation_sequences} sequences of held-out files; ± is the standard deviation over "
        "seeds. The difference is taken seed by seed, so it does not contain what a seed has in common in two arms.",
        120,
    )
    yield ""
    yield fill(
        f"These are models of three million parameters that saw {length.tokens / 1e6:.2g} MB. The numbers say what the "
        "generated code does at this size, and nothing about larger ones; a difference below twice its ± is none.",
        120,
    )
    yield ""


def table(question: Question, of_arm: dict[str, list[Run]]) -> Iterator[str]:
    """Yield the table of a question, the baseline first."""
    baseline = of_arm[question.arms[0].name]
    seeds = " | ".join(f"seed {run.seed}" for run in baseline)
    yield f"| | parameters | active | bits a byte | above the first | {seeds} |"
    yield f"|---|---:|---:|---:|---:|{'---:|' * len(baseline)}"
    for arm in question.arms:
        runs = of_arm[arm.name]
        counts = count_parameters(lower(arm.spec), arm.spec)
        gaps = [run.validation - base.validation for run, base in zip(runs, baseline, strict=True)]
        cells = [arm.label, f"{counts.total:,}", f"{counts.active:,}", spread([run.validation for run in runs])]
        cells += ["" if runs is baseline else spread(gaps, sign=True)]
        yield f"| {' | '.join([*cells, *(f'{run.validation:.4f}' for run in runs)])} |"


def plot(question: Question, of_arm: dict[str, list[Run]], length: Length) -> str:
    """Return the curves of the training loss above the baseline's, as SVG."""
    window = max(1, length.steps // 15)
    baseline = mean_curve(of_arm[question.arms[0].name], window)
    series: list[Series] = []
    for arm in question.arms[1:]:
        curve = mean_curve(of_arm[arm.name], window)
        gap = [(step, loss - base) for (step, loss), (_, base) in zip(curve, baseline, strict=True)]
        series.append(Series(arm.label, gap, joined=True))
    return line_plot(
        series,
        x=f"step (means over {window} steps and all seeds)",
        y=f"training loss above “{question.arms[0].label}”, bits a byte",
        title=question.title,
    )


def sorted_runs(arm: Arm, runs: list[Run]) -> list[Run]:
    """Return the runs of an arm, by seed."""
    return sorted((run for run in runs if run.arm == arm.name), key=lambda run: run.seed)


def spread(values: list[float], *, sign: bool = False) -> str:
    """Return mean ± standard deviation."""
    deviation = stdev(values) if len(values) > 1 else float("nan")
    return f"{mean(values):{'+' if sign else ''}.4f} ± {deviation:.4f}"
