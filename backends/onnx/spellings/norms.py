"""RMSNorm, plain and gated."""

from __future__ import annotations

import onnx_ir as onnx

from n3c.backends.onnx.emitter import Emitter, integer, number
from n3c.ir.program import Node

from .elementwise import silu


def rms_norm(emitter: Emitter, node: Node) -> None:
    """Opset 23 has it: two kernels, of which the second is that of the linear that follows."""
    g, eps = emitter.graph, number(node, "eps")
    x, weight = emitter.operand(node, "x"), emitter.f32(node["weight"])
    y = g.node("RMSNormalization", x, weight, axis=-1, epsilon=eps)
    emitter.bind(node.results[0], y)

    def parts() -> tuple[onnx.Value, onnx.Value]:
        mean = g.node("ReduceMean", g.node("Mul", x, x), g.i64(-1), keepdims=1)
        return g.node("Mul", x, weight), g.node("Reciprocal", g.node("Sqrt", g.node("Add", mean, g.f32(eps))))

    emitter.bind_norm(y, parts)


def gated_rms_norm(emitter: Emitter, node: Node) -> None:
    """Normalize g = x · silu(gate) in groups, g / sqrt(mean(g²) + eps), then multiply the whole with the weight."""
    g = emitter.graph
    sizes, groups = emitter.sizes(node["x"]), integer(node, "groups")
    gated = g.node("Mul", emitter.operand(node, "x"), silu(emitter, emitter.operand(node, "gate")))
    parts = g.node("Reshape", gated, g.i64(*sizes[:-1], groups, sizes[-1] // groups))
    mean = g.node("ReduceMean", g.node("Mul", parts, parts), g.i64(-1), keepdims=1)
    root = g.node("Sqrt", g.node("Add", mean, g.f32(number(node, "eps"))))
    normal: onnx.Value = g.node("Reshape", g.node("Div", parts, root), g.i64(*sizes))
    emitter.bind(node.results[0], g.node("Mul", normal, emitter.f32(node["weight"])))
