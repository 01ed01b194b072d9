"""Embedding, element-wise ops, concatenation and splitting."""

from __future__ import annotations

from math import prod

import numpy as np
import onnx_ir as onnx

from n3c.backends.onnx.emitter import Emitter
from n3c.ir.program import Node


def embedding(emitter: Emitter, node: Node) -> None:
    """Gather rows, then widen: only the rows of the tokens are read."""
    g = emitter.graph
    rows = g.node("Gather", emitter.operand(node, "table"), emitter.operand(node, "ids"), axis=0)
    emitter.bind(node.results[0], g.node("Cast", rows, to=onnx.DataType.FLOAT))


def shift_left(emitter: Emitter, node: Node) -> None:
    """Cut off the first token and append a zero."""
    g = emitter.graph
    batch, tokens = emitter.sizes(node["ids"])
    kept = g.node("Slice", emitter.operand(node, "ids"), g.i64(1), g.i64(tokens), g.i64(1))
    emitter.bind(node.results[0], g.node("Concat", kept, g.constant(np.zeros((batch, 1), np.int64)), axis=1))


def last_token(emitter: Emitter, node: Node) -> None:
    """Gather the row counts[b] - 1 of each sequence; the first where counts[b] is 0."""
    g = emitter.graph
    row = g.node("Max", g.node("Sub", emitter.operand(node, "counts"), g.i64(1)), g.i64(0))
    sizes = emitter.sizes(node["x"])
    emitter.bind(
        node.results[0], rows_of(emitter, emitter.operand(node, "x"), sizes, g.node("Unsqueeze", row, g.i64(1)))
    )


def rows_of(emitter: Emitter, x: onnx.Value, sizes: tuple[int, ...], index: onnx.Value) -> onnx.Value:
    """Return y[…, s, :] = x[…, index[…, s], :] by one Gather: x of `sizes` [A…, R, C], index i64 [A…, S]."""
    g = emitter.graph
    *outer, rows, width = sizes
    first = np.arange(prod(outer)).reshape(*outer, 1) * rows
    flat = g.node("Reshape", x, g.i64(prod(outer) * rows, width))
    return g.node("Gather", flat, g.node("Add", index, g.constant(first)), axis=0)


def add(emitter: Emitter, node: Node) -> None:
    """Add."""
    emitter.bind(node.results[0], emitter.graph.node("Add", emitter.operand(node, "x"), emitter.operand(node, "y")))


def relu2(emitter: Emitter, node: Node) -> None:
    """Relu, then its square as a product with itself: one kernel with what reads it."""
    g = emitter.graph
    positive = g.node("Relu", emitter.operand(node, "x"))
    emitter.bind(node.results[0], g.node("Mul", positive, positive))


def concat(emitter: Emitter, node: Node) -> None:
    """Concat along the last axis."""
    emitter.bind(
        node.results[0], emitter.graph.node("Concat", emitter.operand(node, "x"), emitter.operand(node, "y"), axis=-1)
    )


def split(emitter: Emitter, node: Node) -> None:
    """Split along the last axis."""
    g = emitter.graph
    sizes = [emitter.sizes(result)[-1] for result in node.results]
    operands = (emitter.operand(node, "x"), g.i64(*sizes))
    emitter.bind_results(node, g.nodes_results("Split", operands, len(sizes), "", {"axis": -1}))


def silu(emitter: Emitter, x: onnx.Value) -> onnx.Value:
    """Return x · sigmoid(x)."""
    return emitter.graph.node("Mul", x, emitter.graph.node("Sigmoid", x))
