"""Stages: an entry point cut into several plans, which may run on several GPUs where one is too small.

Every entry point is cut at the same layers, so that a stage has one set of weights and states whatever
runs; what passes from stage to stage is the residual stream, so nothing is lost at a cut but one small
kernel. The time to compile a plan also grows faster than the number of its layers, and so does the
memory: four stages of 22 layers build in two thirds of the time of one plan of 88.
"""

from __future__ import annotations

from dataclasses import replace

from n3c.ir.program import Call, EntryPoint, Program
from n3c.ir.types import TensorType
from n3c.ir.verify import verify


def layer_bytes(program: Program, layers: int, batch: int) -> list[int]:
    """Return the bytes of weights, and of states of `batch` sequences, of each of the first `layers` layers.

    The embedding counts for the first layer; norm, head and drafter for the last.
    """
    sizes = [0] * layers
    for parameter in program.parameters.values():
        at = 0 if parameter.role == "embedding" else layers - 1
        sizes[min(at if parameter.layer is None else parameter.layer, layers - 1)] += parameter.type.bytes
    pending = program.entry_points["verify"].tokens if "verify" in program.entry_points else 1
    for state in program.states.values():
        sizes[min(state.layer, layers - 1)] += state.type.bind({"B": batch, "S": pending}).bytes
    return sizes


def balanced(sizes: list[int], count: int) -> tuple[int, ...]:
    """Return the first index of each of `count` runs of `sizes`, the largest sum of which is as small as can be.

    ValueError where there are fewer sizes than runs.
    """
    if count > len(sizes):
        raise ValueError(f"{len(sizes)} layers do not make {count} stages")
    low, high = max(sizes), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        if len(_filled(sizes, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    starts = _filled(sizes, low)
    while len(starts) < count:  # fewer would do: cut the longest run again
        ends = [*starts[1:], len(sizes)]
        length, first = max((end - start, start) for start, end in zip(starts, ends, strict=True))
        starts = sorted([*starts, first + length // 2])
    return tuple(starts)


def _filled(sizes: list[int], most: int) -> list[int]:
    """Return the first index of each run where every run takes as much as `most` allows."""
    starts, total = [0], 0
    for i, size in enumerate(sizes):
        if total + size > most and i > starts[-1]:
            starts.append(i)
            total = 0
        total += size
    return starts


def stages(program: Program, entry: EntryPoint, starts: tuple[int, ...]) -> list[tuple[int, EntryPoint]]:
    """Cut `entry` before each layer of `starts` but the first; the ends of the model stay with their neighbours.

    Returns (stage, part) for the stages in which `entry` has anything: a drafter is all in the last. A part
    takes what it reads of the entry's inputs and of the results of parts before it, and returns what later
    parts read and what the entry returns.
    """
    groups: dict[int, list[Call]] = {}
    layered = [call.layer for call in entry.calls]
    for i, call in enumerate(entry.calls):
        before = next((layer for layer in reversed(layered[: i + 1]) if layer is not None), None)
        layer = before if before is not None else next((layer for layer in layered[i:] if layer is not None), 0)
        groups.setdefault(sum(start <= layer for start in starts) - 1, []).append(call)
    types = _types(program, entry)
    made: list[tuple[int, EntryPoint]] = []
    for stage, group in groups.items():
        name = entry.name if len(starts) == 1 else f"{entry.name}.s{stage}"
        defined = {output for call in group for output in call.outputs}
        read = dict.fromkeys(name for call in group for name in call.inputs if name not in defined)
        later = {name for after, calls in groups.items() if after > stage for call in calls for name in call.inputs}
        outputs = [output for call in group for output in call.outputs if output in later or output in entry.outputs]
        inputs = {value: types[value] for value in read}
        part = replace(entry, name=name, inputs=inputs, calls=group, outputs=outputs)
        verify(program.extract(part))
        made.append((stage, part))
    return made


def _types(program: Program, entry: EntryPoint) -> dict[str, TensorType]:
    """Return the type of every value that passes between calls."""
    types = dict(entry.inputs)
    for call in entry.calls:
        results = program.functions[call.function].outputs
        types.update((name, value.type) for name, value in zip(call.outputs, results, strict=True))
    return types
