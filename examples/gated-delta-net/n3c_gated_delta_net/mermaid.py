"""A backend: one Mermaid flowchart of each entry point, which GitHub and many editors draw.

A box is a call of the program with the ops of its function; a rounded box is a state that it reads and writes.
"""

from __future__ import annotations

from collections.abc import Iterator

from n3c.backends.added import Backend
from n3c.ir.program import EntryPoint, Program
from n3c.passes.serving import Served
from n3c.specs.schema import Spec


def emit(spec: Spec, served: Served) -> dict[str, str]:
    """Return a flowchart of each entry point: name → text."""
    program = served.program
    return {f"{name}.mmd": "\n".join(_chart(program, entry)) + "\n" for name, entry in program.entry_points.items()}


def _chart(program: Program, entry: EntryPoint) -> Iterator[str]:
    yield "flowchart TD"
    made: dict[str, str] = {}
    """Value → the box that gives it."""
    for number, name in enumerate(entry.inputs):
        made[name] = f"in{number}"
        yield f'  in{number}(["{name}"])'
    for number, call in enumerate(entry.calls):
        box = f"c{number}"
        ops = " · ".join(node.op.name for node in program.functions[call.function].nodes)
        yield f'  {box}["{call.label}<br/>{ops}"]'
        yield from (f"  {made[name]} --> {box}" for name in dict.fromkeys(call.inputs))
        yield from (f'  {box} <--> {box}s{at}[("{name}")]' for at, name in enumerate(call.states))
        made |= dict.fromkeys(call.outputs, box)
    for number, name in enumerate(entry.outputs):
        yield f'  {made[name]} --> out{number}(["{name}"])'


MERMAID = Backend("mermaid", "flowcharts of the entry points", emit)
