"""The memory of a process that builds a plan, estimated from the plan's graph before it is built."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from n3c.backends.onnx.emit import OnnxEntry

BUILDER_COPIES = 3
"""Copies of embedded weights that building a plan holds at once; measured in docs/engine-forms.md."""
_PROCESS = 330_000_000
_NODE = 150_000
_NODE_IN_LOOP = 700_000
"""Bytes: of the process with TensorRT loaded, of each node of the graph, and of each within a Loop."""


def builder_bytes(entry: OnnxEntry, *, embedded: bool = False) -> int:
    """Return an estimate of the most bytes that a process holds while it builds the plan of `entry`.

    Weights count where they are `embedded`: `BUILDER_COPIES` of them. The rest was fitted to TensorRT-RTX 1.7.1 for SM
    120 on Linux: every entry point of Super and Ultra in four stages (0.3 to 2.2 GB), decode and prefill of Super
    whole (2.0 to 5.3 GB). It is from 4 % below to 12 % above what these take, and 2 to 10 % above four builds that it
    was not fitted to: decode and prefill of Nano whole, prefill of 8 and of 12 layers of Super.
    """
    graph = entry.model.graph
    in_loops = sum(1 for _ in graph.all_nodes()) - len(graph)
    weights = BUILDER_COPIES * sum(parameter.type.bytes for parameter in entry.parameters) if embedded else 0
    return _PROCESS + _NODE * len(graph) + _NODE_IN_LOOP * in_loops + weights
