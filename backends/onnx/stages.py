"""Cut an entry point into stages, each of which becomes a plan of its own.

The time to compile a plan grows faster than the number of its layers, and so does the memory: four
stages of 22 layers build in about half the time of one plan of 88. What passes from stage to stage
is the residual stream, so nothing is lost at a cut but one small kernel.
"""

from __future__ import annotations

from n3c.ir.program import Call, EntryPoint, Program
from n3c.ir.types import TensorType


def stages(program: Program, entry: EntryPoint, layers: int) -> list[EntryPoint]:
    """Cut `entry` after every `layers` residual blocks; the ends of the model stay with their neighbours.

    A stage takes what it reads of the entry's inputs and of the results of stages before it, and
    returns what later stages read and what the entry returns.
    """
    groups: list[list[Call]] = [[]]
    blocks = 0
    for call in entry.calls:
        if call.layer is not None and blocks and blocks % layers == 0:
            groups.append([])
        blocks += call.layer is not None
        groups[-1].append(call)
    types = _types(program, entry)
    made: list[EntryPoint] = []
    for i, group in enumerate(groups):
        name = entry.name if len(groups) == 1 else f"{entry.name}.s{i}"
        defined = {output for call in group for output in call.outputs}
        read = dict.fromkeys(name for call in group for name in call.inputs if name not in defined)
        later = {name for after in groups[i + 1 :] for call in after for name in call.inputs}
        outputs = [output for call in group for output in call.outputs if output in later or output in entry.outputs]
        made.append(EntryPoint(name, {value: types[value] for value in read}, group, outputs))
    return made


def _types(program: Program, entry: EntryPoint) -> dict[str, TensorType]:
    """Return the type of every value that passes between calls."""
    types = dict(entry.inputs)
    for call in entry.calls:
        results = program.functions[call.function].outputs
        types.update((name, value.type) for name, value in zip(call.outputs, results, strict=True))
    return types
