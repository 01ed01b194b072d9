"""docs/reference: pages made from ops, passes and the helps of commands, so that they cannot fall behind."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterator
from typing import Any

from n3c.backends.gpus import GPUS
from n3c.compiler.cli.main import SECTIONS
from n3c.ir.op_definition import OPS
from n3c.passes.lower import model as lowering
from n3c.passes.pipelines import ELSEWHERE, SERVING, STAGES
from support.command import n3c

MADE = "<!-- Made by `make golden`: do not edit. -->\n\n"


def ops_page() -> str:
    """Return the definition of each op: its equation, its operands and attributes."""
    text = MADE + (
        "# Ops\n\nThe alphabet of the IR. `?` marks an operand that may be left out, **bold** one that is a weight of\n"
        "a linear, to which formats apply; after the semicolon are the attributes. The letters of sizes are those of\n"
        "[the design](../design.md); arithmetic is float32 whatever the storage types are.\n"
        "`n3c build SPEC --target torch --print-ir-after all` shows them at work.\n"
    )
    for op in OPS.values():
        operands = [
            f"**{name}**" if name in op.weights else f"{name}?" if name in op.optional else name for name in op.operands
        ]
        attributes = f"; {', '.join(op.attributes)}" if op.attributes else ""
        text += f"\n## {op.name}\n\n{', '.join(operands)}{attributes}\n\n```text\n{op.doc}\n```\n"
    return text


def passes_page() -> str:
    """Return what the module of each pass says: its pattern, its cases, its place in the order."""
    text = MADE + (
        "# Passes\n\nWhat is deployed goes through these, in this order: "
        + " → ".join(f"`{stage}`" for stage in STAGES)
        + ". `n3c passes`\nlists them. Training runs none: generated code carries its own numerics.\n"
    )
    text += f"\n## lower\n\n{_module_text(lowering.__name__)}\n"
    return text + "".join(_pass_text(pass_) for pass_ in (*(stage.pass_ for stage in SERVING), *ELSEWHERE))


def _pass_text(pass_: type[Any]) -> str:
    options = ", ".join(f"`{field.name}: {field.type}`" for field in dataclasses.fields(pass_))
    text = f"\n## {pass_.name}\n\n{_module_text(pass_.__module__)}\n"
    return f"{text}\nOptions: {options}.\n" if options else text


def _module_text(module: str) -> str:
    return f"```text\n{inspect.cleandoc(sys.modules[module].__doc__ or '')}\n```"


def gpus_page() -> str:
    """Return the table of the GPUs that n3c knows, in the units of data sheets."""
    text = MADE + (
        "# GPUs\n\nWhat [predictions of time](../engine-forms.md) and `n3c simulate --gpu` count with. Memory is what\n"
        "the driver reports; peaks are dense products that accumulate in float32, in TFLOP/s.\n\n"
        "| GPU | SM | MiB | GB/s | L2, MiB | multiprocessors | MHz | BF16 | FP8 | FP4 | W | source |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|---|\n"
    )
    for gpu in GPUS.values():
        peaks = [f"{peak / 1e12:,g}" if peak else "" for peak in (gpu.bf16, gpu.fp8, gpu.fp4)]
        memory = [f"{gpu.memory / 2**20:,.10g}", f"{gpu.bandwidth / 1e9:,g}", f"{gpu.l2 / 2**20:g}"]
        clocks = [f"{gpu.multiprocessors}", f"{gpu.clock / 1e6:g}"]
        row = [str(gpu), f"{gpu.sm}", *memory, *clocks, *peaks, f"{gpu.watts}", gpu.source]
        text += f"| {' | '.join(row)} |\n"
    return text


def options_page() -> str:
    """Return the help of each command, as a terminal of 80 columns shows it."""
    return MADE + "".join(_options()).rstrip() + "\n"


def _options() -> Iterator[str]:
    yield "# Options\n\nThe help of every command; [the command line](../command-line.md) explains them.\n"
    for section, commands in SECTIONS.items():
        yield f"\n## {section}\n"
        for name in commands:
            yield f"\n### n3c {name}\n\n```text\n{n3c(name, '--help').out.strip()}\n```\n"
